"""The ``pallas_tpu`` backend: work list and layout around the kernels, and their gradient."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from kernels_pallas.layout import LANES, pad_end, round_up, rows_from_blocks, rows_to_blocks
from kernels_pallas.mask import BlockMap, RowInfo, block_map, per_row
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill.arguments import (
    SAVED,
    PrefillArguments,
    without_padding,
)
from kernels_pallas.swa_prefill.pallas_tpu_tiles import (
    Tiles,
    check_tiles,
    choose_tiles,
    most_items,
    vmem_limit_bytes,
)
from kernels_pallas.swa_prefill.work_list import (
    WorkList,
    build_work_list,
    build_work_list_by_key,
)

if TYPE_CHECKING:
    from kernels_pallas.swa_prefill.pallas_tpu_kernels import KernelStatic

_LOG2_E = float(np.log2(np.e))


def limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """What the kernels do not take, and what does not fit scalar memory."""
    found = []
    if arguments.q.dtype not in (jnp.float32, jnp.bfloat16):
        found.append(f"q: expected float32 or bfloat16, got {arguments.q.dtype} (cast it)")
    if arguments.q.shape[3] > 256:
        found.append(f"q: expected a head dim of at most 256, got {arguments.q.shape[3]}")
    if not found and _rows_at_once(arguments) is None:
        found.append(
            "q: expected a work list within scalar memory, got too long a one for shape (B, T, S) "
            f"= {arguments.shape} (split the batch)"
        )
    return tuple(found)


def compute(
    arguments: PrefillArguments,
    *,
    tiles: Tiles | None = None,
    generation: str | None = None,
    interpret: Any = False,
) -> AttentionOutput:
    """Attention by the TPU kernels; the log-sum-exp is always filled in.

    Queries whose work list would not fit scalar memory are computed in parts, one after the other.

    Args:
      arguments: without limits.
      tiles: None: :func:`choose_tiles`.
      generation: whose tiles to take, a name of ``chips.TPUS``; None: of the arguments' target.
      interpret: run on any device, slowly: True or ``pltpu.InterpretParams``.

    Raises:
      ValueError: tiles that no TPU takes.
      NotImplementedError: the given tiles' work list is beyond scalar memory.
    """
    # Imported here: only those who run it need the TPU half of Pallas to import.
    from kernels_pallas.swa_prefill.pallas_tpu_kernels import KernelStatic

    num_queries = arguments.q.shape[1]
    if tiles is None:
        at_once = _rows_at_once(arguments, generation=generation)
        assert at_once is not None, "`limits` says where none fit"
        if at_once < num_queries:
            one = functools.partial(compute, generation=generation, interpret=interpret)
            return _in_parts(one, arguments, at_once)
    tiles = tiles or choose_tiles(arguments, generation=generation)
    assert tiles is not None, "there are some for so many rows"
    check_tiles(arguments, tiles, interpret=bool(interpret))
    rows = arguments.rows()
    num_kv_heads = arguments.k.shape[2]
    static = KernelStatic(
        scale=float(arguments.scale),
        softcap=None if arguments.softcap is None else float(arguments.softcap),
        is_full=arguments.window is None,
        has_segments=rows.k_segment is not None,
        heads=math.gcd(tiles.kv_heads, num_kv_heads),
        chunk=tiles.chunk,
        num_kv_blocks=-(-arguments.shape[2] // tiles.block_kv),
        most_items=most_items(arguments, tiles),
        vmem_limit_bytes=vmem_limit_bytes(arguments, tiles, generation=generation),
        interpret=interpret,
    )
    q, k, v = without_padding(arguments, rows)
    blocks = block_map(
        rows,
        window=arguments.window,
        num_sink_tokens=arguments.num_sink_tokens,
        block_q=tiles.block_q,
        block_kv=tiles.block_kv,
    )
    result = _compiled_attention(
        static,
        rows_to_blocks(q, tiles.block_q, num_kv_heads=num_kv_heads),
        _keys_to_blocks(k, v, tiles.block_kv),
        _q_info(arguments, rows, tiles.block_q),
        _k_info(arguments, rows, tiles.block_kv),
        blocks,
    )
    out, lse = cast(tuple[Array, Array], result)
    from_blocks = functools.partial(
        rows_from_blocks,
        num_batch=q.shape[0],
        num_queries=num_queries,
        num_groups=q.shape[2] // num_kv_heads,
    )
    out = from_blocks(out)
    lse = from_blocks(lse.swapaxes(2, 3))[..., 0]  # [rows, K, 1, R] -> [rows, K, R, 1]
    if arguments.lengths is not None:
        out = jnp.where(rows.q_valid[:, :, None, None], out, 0)
        lse = jnp.where(rows.q_valid[:, :, None], lse, -jnp.inf)
    return AttentionOutput(out=out, lse=lse)


def _rows_at_once(arguments: PrefillArguments, *, generation: str | None = None) -> int | None:
    """How many of the queries one work list has room for: all, or parts of them; None: for none."""
    part, size = arguments, arguments.q.shape[1]

    def shape(x: Any) -> Any:
        if x is None:
            return None
        return jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[2:]), x.dtype)

    while choose_tiles(part, generation=generation) is None:
        if size <= LANES:
            return None
        size = round_up(-(-size // 2), LANES)
        offset: Any = jax.ShapeDtypeStruct((), jnp.int32)  # another one for each part
        part = dataclasses.replace(
            arguments, q=shape(arguments.q), q_full=shape(arguments.q_full), q_offset=offset
        )
    return size


def _in_parts(
    one: Callable[[PrefillArguments], AttentionOutput], arguments: PrefillArguments, size: int
) -> AttentionOutput:
    """`size` queries after the others. Gradients of keys and values are added in their dtype.

    The last part ends with the last query; what it has in common with the one before is cut off::

        [ part 0      ][ part 1      ]
                               [ part 2      ]
                                     [ taken ]
    """
    num_queries = arguments.q.shape[1]
    count = -(-num_queries // size)

    def part(first: Array) -> tuple[Array, Array | None]:
        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, first, size, axis=1)

        q_full = None if arguments.q_full is None else cut(arguments.q_full)
        offset = arguments.q_offset + first
        found = one(
            dataclasses.replace(arguments, q=cut(arguments.q), q_full=q_full, q_offset=offset)
        )
        return found.out, found.lse

    def joined(parts: Array) -> Array:
        whole = jnp.moveaxis(parts[:-1], 0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])
        return jnp.concatenate([whole, parts[-1][:, whole.shape[1] - num_queries :]], axis=1)

    firsts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, num_queries - size)
    out, lse = jax.tree.map(joined, lax.map(part, firsts))
    return AttentionOutput(out=out, lse=lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: "KernelStatic",
    q: Array,
    kv: Array,
    q_info: Array,
    k_info: Array | None,
    blocks: BlockMap,
) -> tuple[Array, Array]:
    from kernels_pallas.swa_prefill import pallas_tpu_kernels

    return pallas_tpu_kernels.forward(static, q, kv, q_info, k_info, _work_list(static, blocks))


def _forward_saving(static: "KernelStatic", q: Array, kv: Array, *rest: Any):
    out, lse = checkpoint_name(cast(tuple[Array, Array], _attention(static, q, kv, *rest)), SAVED)
    return (out, lse), (q, kv, *rest, out, lse)


def _backward(static: "KernelStatic", saved: tuple[Any, ...], cotangents: tuple[Array, Array]):
    """dq, dk, dv. With ``p = exp(s - lse)``: ``ds = p (do.v - delta)``, ``delta = do.o - dlse``."""
    from kernels_pallas.swa_prefill import pallas_tpu_gradient

    q, kv, q_info, k_info, blocks, out, lse = saved
    do, dlse = cotangents
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None] - dlse
    by_key, visited = build_work_list_by_key(
        blocks, num_kv_blocks=static.num_kv_blocks, most_items=static.most_items
    )
    dq, dkv = pallas_tpu_gradient.backward(
        static,
        q,
        kv,
        q_info,
        k_info,
        do,
        jnp.concatenate([lse * _LOG2_E, delta], axis=2),
        _work_list(static, blocks),
        by_key,
    )
    # Key blocks that no row sees are not in the list: nothing was written there.
    return dq, jnp.where(visited[:, None, None, None, None], dkv, 0), None, None, None


_attention.defvjp(_forward_saving, _backward)

# Without this, every call outside jit would compile the kernels anew.
_compiled_attention = jax.jit(_attention, static_argnums=0)


def _work_list(static: "KernelStatic", blocks: BlockMap) -> WorkList:
    return build_work_list(blocks, num_kv_blocks=static.num_kv_blocks, most_items=static.most_items)


def _q_info(
    arguments: PrefillArguments, rows: RowInfo, block_q: int
) -> Int[Array, "rows 8 block_q"]:
    """Integers of the query rows. A full row has a window that reaches over all keys."""
    num_keys = arguments.shape[2]
    window = num_keys if arguments.window is None else arguments.window
    window_BT = jnp.broadcast_to(per_row(window)[:, None], rows.q_index.shape)
    if rows.q_full is not None:
        window_BT = jnp.where(rows.q_full, num_keys, window_BT)
    sinks_BT = jnp.broadcast_to(per_row(arguments.num_sink_tokens)[:, None], rows.q_index.shape)
    # Position -1 is before every key: padding rows see nothing.
    info = [jnp.where(rows.q_valid, rows.q_pos, -1), window_BT, sinks_BT]
    if rows.q_segment is not None:
        info.append(rows.q_segment)
    return _info_blocks(info, block_q, fill=-1)


def _k_info(
    arguments: PrefillArguments, rows: RowInfo, block_kv: int
) -> Int[Array, "columns 8 block_kv"] | None:
    """Integers of the keys where there are segments; what fills up the last block ends the row."""
    if rows.k_start is None or rows.k_segment is None:
        return None
    num_keys = arguments.shape[2]
    position = jnp.arange(num_keys, dtype=jnp.int32)[None] - rows.k_start
    return _info_blocks([position, rows.k_segment], block_kv, fill=num_keys)


def _info_blocks(info: list[Array], block: int, *, fill: int) -> Int[Array, "blocks 8 block"]:
    """``[B, L]`` integers as rows of blocks; what fills up the last block holds ``fill``."""
    stacked = jnp.stack([x.astype(jnp.int32) for x in info], axis=1)  # [B, n, L]
    stacked = pad_end(stacked, -stacked.shape[2] % block, axis=2, value=fill)
    stacked = pad_end(stacked, 8 - len(info), axis=1)
    blocks = stacked.reshape(stacked.shape[0], 8, -1, block)
    return blocks.transpose(0, 2, 1, 3).reshape(-1, 8, block)


def _keys_to_blocks(k: Array, v: Array, block_kv: int) -> Array:
    """Two ``[B, S, K, H]`` to ``[B * blocks, K, 2, block_kv, H]``."""
    x = jnp.stack([k, v], axis=2)  # B, S, 2, K, H
    x = pad_end(x, -x.shape[1] % block_kv, axis=1)
    x = x.reshape(-1, block_kv, *x.shape[2:])
    return x.transpose(0, 3, 2, 1, 4)
