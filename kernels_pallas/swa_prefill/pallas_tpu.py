"""The ``pallas_tpu`` backend: work list and layout around the kernels, and their gradient."""

import functools
import math
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels_pallas.backends import register_backend
from kernels_pallas.mask import BlockMap, RowInfo, block_map, per_row
from kernels_pallas.swa_prefill.arguments import (
    AttentionOutput,
    PrefillArguments,
    without_padding,
)
from kernels_pallas.swa_prefill.pallas_tpu_tiles import (
    Tiles,
    check_tiles,
    choose_tiles,
    most_items,
    prefill_tpu_limits,
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


@register_backend("swa_prefill", "pallas_tpu", limits=prefill_tpu_limits)
def prefill_tpu(
    arguments: PrefillArguments,
    *,
    return_lse: bool,
    tiles: Tiles | None = None,
    generation: str | None = None,
    interpret: Any = False,
) -> AttentionOutput:
    """Attention by the TPU kernels; the log-sum-exp is always filled in.

    Args:
      arguments: validated.
      return_lse: no matter.
      tiles: None: :func:`choose_tiles`.
      generation: whose tiles to take, a name of ``tpu_tiles.GENERATIONS``; None: of the
        arguments' target.
      interpret: run on any device, slowly: True or ``pltpu.InterpretParams``.

    Raises:
      ValueError: tiles that no TPU takes.
      NotImplementedError: float16, a head dim above 256, or a work list beyond scalar memory.
    """
    del return_lse
    # Imported here: only those who run it need the TPU half of Pallas to import.
    from kernels_pallas.swa_prefill.pallas_tpu_kernels import KernelStatic

    num_queries, head_dim = arguments.q.shape[1], arguments.q.shape[3]
    if arguments.q.dtype == jnp.float16 or head_dim > 256:
        raise NotImplementedError(
            f"swa_prefill: pallas_tpu takes float32 and bfloat16 and head dims up to 256, got "
            f"{arguments.q.dtype} and {head_dim}; cast, or pass backend='xla'"
        )
    if tiles is None:
        tiles = choose_tiles(arguments, generation=generation)
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
        _rows_to_blocks(q, tiles.block_q, num_kv_heads),
        _keys_to_blocks(k, v, tiles.block_kv),
        _q_info(arguments, rows, tiles.block_q),
        _k_info(arguments, rows, tiles.block_kv),
        blocks,
    )
    out, lse = cast(tuple[Array, Array], result)
    num_batch, num_groups = q.shape[0], q.shape[2] // num_kv_heads
    out = _rows_from_blocks(out, num_batch, num_queries, num_groups)
    # [rows, K, 1, R] -> [rows, K, R, 1]
    lse = _rows_from_blocks(lse.swapaxes(2, 3), num_batch, num_queries, num_groups)[..., 0]
    if arguments.lengths is not None:
        out = jnp.where(rows.q_valid[:, :, None, None], out, 0)
        lse = jnp.where(rows.q_valid[:, :, None], lse, -jnp.inf)
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


def _forward_saving(static: Any, q: Array, kv: Array, *rest: Any):
    out, lse = cast(tuple[Array, Array], _attention(static, q, kv, *rest))
    return (out, lse), (q, kv, *rest, out, lse)


def _backward(static: Any, saved: tuple[Any, ...], cotangents: tuple[Array, Array]):
    """dq, dk, dv. With ``p = exp(s - lse)``: ``ds = p (do.v - delta)``, ``delta = do.o - dlse``."""
    from kernels_pallas.swa_prefill import pallas_tpu_kernels

    q, kv, q_info, k_info, blocks, out, lse = saved
    do, dlse = cotangents
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None] - dlse
    by_key, visited = build_work_list_by_key(
        blocks, num_kv_blocks=static.num_kv_blocks, most_items=static.most_items
    )
    dq, dkv = pallas_tpu_kernels.backward(
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
    length = info[0].shape[1]
    stacked = jnp.stack([x.astype(jnp.int32) for x in info], axis=1)  # [B, n, L]
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, -length % block)), constant_values=fill)
    stacked = jnp.pad(stacked, ((0, 0), (0, 8 - len(info)), (0, 0)))
    blocks = stacked.reshape(stacked.shape[0], 8, -1, block)
    return blocks.transpose(0, 2, 1, 3).reshape(-1, 8, block)


def _rows_to_blocks(q: Array, block_q: int, num_kv_heads: int) -> Array:
    """``[B, T, N, H]`` to ``[B * blocks, K, G * block_q, H]``: the heads of a group stacked."""
    num_batch, num_queries, num_heads, head_dim = q.shape
    q = jnp.pad(q, ((0, 0), (0, -num_queries % block_q), (0, 0), (0, 0)))
    num_groups = num_heads // num_kv_heads
    q = q.reshape(num_batch, -1, block_q, num_kv_heads, num_groups, head_dim)
    q = q.transpose(0, 1, 3, 4, 2, 5)  # B, block, K, G, row, H
    return q.reshape(-1, num_kv_heads, num_groups * block_q, head_dim)


def _rows_from_blocks(x: Array, num_batch: int, num_queries: int, num_groups: int) -> Array:
    """The inverse of :func:`_rows_to_blocks`, without its padding."""
    _, num_kv_heads, num_rows, head_dim = x.shape
    x = x.reshape(num_batch, -1, num_kv_heads, num_groups, num_rows // num_groups, head_dim)
    x = x.transpose(0, 1, 4, 2, 3, 5)  # B, block, row, K, G, H
    return x.reshape(num_batch, -1, num_kv_heads * num_groups, head_dim)[:, :num_queries]


def _keys_to_blocks(k: Array, v: Array, block_kv: int) -> Array:
    """Two ``[B, S, K, H]`` to ``[B * blocks, K, 2, block_kv, H]``."""
    x = jnp.stack([k, v], axis=2)  # B, S, 2, K, H
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block_kv), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(-1, block_kv, *x.shape[2:])
    return x.transpose(0, 3, 2, 1, 4)
