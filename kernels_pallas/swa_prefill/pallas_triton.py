"""The ``pallas_triton`` backend: a kernel for chunks of prompts beside what is cached.

A program is a block of one head's queries, and reads the blocks of keys that they see::

    keys      sinks   .    . window . . . . . . . . . . chunk
            [ masked |    | masked | free  free  free | masked ]
              n_sink        left     all rows see all   diagonal

Rows behind a row's length cost nothing but their zeros. There is no gradient of its own: where one
is asked for, the ``xla`` backend computes it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import LOWEST, next_power_of_two, pad_end
from kernels_pallas.mask import per_row, visible
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill import xla
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from kernels_pallas.triton import triton as plgpu
from kernels_pallas.triton import triton_limits

_LOG2_E = math.log2(math.e)
_LEAST_HEAD_DIM = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernel is cut: queries and keys of a block, powers of two; Triton's warps, stages."""

    block_q: int = 128
    block_kv: int = 64
    num_warps: int = 8
    num_stages: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    tiles: Tiles
    is_full: bool
    has_full_rows: bool
    scale: float
    softcap: float | None
    interpret: bool


def limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """What the kernel cannot compute."""
    found, head_dim = triton_limits(arguments.q.dtype), arguments.q.shape[3]
    if head_dim > 256:
        found.append(f"q: expected a head dim of at most 256, got {head_dim}")
    if arguments.segment_ids is not None:
        found.append("segment_ids: expected None, got an array")
    if arguments.return_lse:
        found.append("return_lse: expected False, got True")
    return tuple(found)


def drawbacks(arguments: PrefillArguments) -> tuple[str, ...]:
    """Whole rows are cuDNN's, which has a gradient."""
    if isinstance(arguments.q_offset, int) and arguments.q_offset == 0:
        return ("q_offset: whole rows, which cudnn computes faster",)
    return ()


def choose_tiles(head_dim: int) -> Tiles:
    """Those that an H100 was fastest with; wide heads leave less room."""
    return Tiles() if head_dim <= 128 else Tiles(block_q=64, block_kv=32, num_warps=4, num_stages=2)


def compute(arguments: PrefillArguments) -> AttentionOutput:
    """Compiled for the GPU; ``lse`` is NaN. Padding may hold NaN."""
    return attend_in_blocks(arguments, tiles=choose_tiles(arguments.q.shape[3]))


def attend_in_blocks(
    arguments: PrefillArguments, *, tiles: Tiles, interpret: bool = False
) -> AttentionOutput:
    """The kernel with these tiles; ``interpret``: in plain JAX, on any device."""
    static = _Static(
        tiles=tiles,
        is_full=arguments.window is None,
        has_full_rows=arguments.q_full is not None and arguments.window is not None,
        scale=float(arguments.scale),
        softcap=arguments.softcap,
        interpret=interpret,
    )
    per_row_arrays: dict[str, Array] = {
        name: jnp.asarray(value, jnp.int32)
        for name in ("window", "num_sink_tokens", "q_offset", "lengths")
        if (value := getattr(arguments, name)) is not None
    }
    if static.has_full_rows:
        per_row_arrays["q_full"] = jnp.asarray(arguments.q_full)
    # Blocks are powers of two, heads too. A wider head changes no product.
    head_dim = arguments.q.shape[3]
    wider = max(_LEAST_HEAD_DIM, next_power_of_two(head_dim)) - head_dim
    q, k, v = (pad_end(x, wider, axis=3) for x in (arguments.q, arguments.k, arguments.v))
    out: Any = _attend(static, q, k, v, per_row_arrays)
    out = out[..., :head_dim]
    return AttentionOutput(out=out, lse=jnp.full(out.shape[:3], jnp.nan, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    static: _Static,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    known: dict[str, Array],
) -> Float[Array, "B T N H"]:
    num_batch, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    block_q = static.tiles.block_q
    padding = -num_queries % block_q

    def each(name: str, default: int) -> Int[Array, " B"]:
        value = per_row(known[name]) if name in known else jnp.int32(default)
        return jnp.broadcast_to(value.astype(jnp.int32), (num_batch,))

    offset_B = each("q_offset", 0)
    # What a row's queries see at most, and what its keys hold.
    end_B = jnp.minimum(each("lengths", num_keys), offset_B + num_queries)
    rules = (offset_B, end_B, each("window", 0), each("num_sink_tokens", 0))
    full_BT = known.get("q_full", jnp.zeros((num_batch, num_queries), bool))
    kernel = functools.partial(
        _attend_to_keys, static=static, num_keys=num_keys, num_groups=num_heads // num_kv_heads
    )
    shape = (num_batch, num_queries + padding, num_heads, head_dim)
    out = pl.pallas_call(
        kernel,
        grid=(shape[1] // block_q, num_heads, num_batch),
        out_shape=jax.ShapeDtypeStruct(shape, q.dtype),
        compiler_params=plgpu.CompilerParams(
            num_warps=static.tiles.num_warps, num_stages=static.tiles.num_stages
        ),
        interpret=static.interpret,
        name="swa_prefill",
    )(
        jnp.stack(rules, axis=1),
        pad_end(full_BT.astype(jnp.int32), padding, axis=1),
        pad_end(q, padding, axis=1),
        k,
        v,
    )
    return out[:, :num_queries]


def _attend_forward(static: _Static, q: Array, k: Array, v: Array, known: dict[str, Array]):
    return _attend(static, q, k, v, known), (q, k, v, known)


def _attend_backward(static: _Static, saved: tuple[Any, ...], cotangent: Array):
    q, k, v, known = saved

    def in_xla(q: Array, k: Array, v: Array) -> Array:
        fields: dict[str, Any] = {"window": None, **known}
        return xla.compute(
            PrefillArguments(q=q, k=k, v=v, scale=static.scale, softcap=static.softcap, **fields)
        ).out

    return (*jax.vjp(in_xla, q, k, v)[1](cotangent), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _attend_to_keys(
    # in
    rules_ref: Any,  # [B, 4]: offset, end, window, sinks
    full_ref: Any,  # [B, T]
    q_ref: Any,  # [B, T, N, H]
    k_ref: Any,  # [B, S, K, H]
    v_ref: Any,
    # out
    out_ref: Any,  # [B, T, N, H]
    *,
    static: _Static,
    num_keys: int,
    num_groups: int,
) -> None:
    block_q, block_kv = static.tiles.block_q, static.tiles.block_kv
    # The last blocks see the most keys, and come first.
    number = pl.num_programs(0) - 1 - pl.program_id(0)
    head, row = pl.program_id(1), pl.program_id(2)
    offset, end, window, sinks = (rules_ref[row, rule] for rule in range(4))
    rows = pl.ds(number * block_q, block_q)
    q_TH = q_ref[row, rows, head]
    q_index = offset + number * block_q + jnp.arange(block_q)
    first = offset + number * block_q
    last = jnp.minimum(first + block_q, end) - 1
    q_full = full_ref[row, rows] > 0

    # Blocks of keys: free from `free` to `diagonal`, which all rows see whole; see above.
    stop = jnp.where(first < end, pl.cdiv(last + 1, block_kv), 0)
    left = free = jnp.int32(0)
    if not static.is_full:
        left = jnp.maximum(first - window + 1, 0) // block_kv
        free = pl.cdiv(jnp.maximum(last - window + 1, 0), block_kv)
        if static.has_full_rows:
            left = jnp.where(jnp.max(q_full.astype(jnp.int32)) > 0, 0, left)
    left, free = jnp.minimum(left, stop), jnp.minimum(free, stop)
    diagonal = jnp.clip((first + 1) // block_kv, free, stop)
    num_sink_blocks = jnp.minimum(pl.cdiv(jnp.minimum(sinks, num_keys), block_kv), left)
    num_left = num_sink_blocks + free - left

    def masked_block(step: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block = jnp.where(step < num_sink_blocks, step, left + step - num_sink_blocks)
        block = jnp.where(step < num_left, block, diagonal + step - num_left)
        return add_block(block, sums, masked=True)

    def add_block(
        block: Array, sums: tuple[Array, Array, Array], *, masked: bool
    ) -> tuple[Array, Array, Array]:
        largest_T, total_T, out_TH = sums
        start = block * block_kv
        k_index = start + jnp.arange(block_kv)
        here = (row, pl.ds(start, block_kv), head // num_groups)
        there = {"mask": (k_index < end)[:, None], "other": 0} if masked else {}
        k_SH = plgpu.load(k_ref.at[here], **there)
        scores_TS = plgpu.dot(q_TH, k_SH, trans_b=True).astype(jnp.float32)
        if static.softcap is None:
            scores_TS *= static.scale * _LOG2_E
        else:
            scores_TS = static.softcap * jnp.tanh(scores_TS * (static.scale / static.softcap))
            scores_TS *= _LOG2_E
        if masked:
            seen_TS = visible(
                q_index[:, None],
                k_index[None],
                window=None if static.is_full else window,
                num_sink_tokens=sinks,
                q_full=q_full[:, None] if static.has_full_rows else False,
            )
            scores_TS = jnp.where(seen_TS, scores_TS, -jnp.inf)
        new_largest_T = jnp.maximum(largest_T, jnp.max(scores_TS, axis=1))
        weights_TS = jnp.exp2(scores_TS - new_largest_T[:, None])
        shrunk_T = jnp.exp2(largest_T - new_largest_T)
        v_SH = plgpu.load(v_ref.at[here], **there)
        weighed_TH = plgpu.dot(weights_TS.astype(v_SH.dtype), v_SH).astype(jnp.float32)
        return (
            new_largest_T,
            total_T * shrunk_T + jnp.sum(weights_TS, axis=1),
            out_TH * shrunk_T[:, None] + weighed_TH,
        )

    sums = (
        jnp.full((block_q,), LOWEST, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
        jnp.zeros(q_TH.shape, jnp.float32),
    )
    sums = lax.fori_loop(0, num_left + stop - diagonal, masked_block, sums)
    sums = lax.fori_loop(free, diagonal, functools.partial(add_block, masked=False), sums)
    _, total_T, out_TH = sums
    out_TH = out_TH / jnp.where(total_T > 0, total_T, 1)[:, None]
    out_ref[row, rows, head] = jnp.where((q_index < end)[:, None], out_TH, 0).astype(out_ref.dtype)
