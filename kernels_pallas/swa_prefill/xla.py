"""The ``xla`` backend: blockwise attention on any device; cuDNN on a GPU where it fits exactly."""

import functools
import logging
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.backends import Target, register_backend
from kernels_pallas.mask import RowInfo, block_map, per_row
from kernels_pallas.swa_prefill.arguments import (
    AttentionOutput,
    PrefillArguments,
    without_padding,
)
from kernels_pallas.swa_prefill.blockwise import (
    KeyRows,
    Static,
    StepRows,
    Tiling,
    blockwise_attention,
)
from kernels_pallas.swa_prefill.cudnn import cudnn_limits, prefill_cudnn

logger = logging.getLogger(__name__)

# Without this, every call outside jit would compile the loops anew.
_compiled_attention = jax.jit(blockwise_attention, static_argnums=0)


@register_backend("swa_prefill", "xla")
def prefill_xla(
    arguments: PrefillArguments, *, return_lse: bool, tiling: Tiling | None = None
) -> AttentionOutput:
    """Blockwise attention with ``tiling``, or with sizes from :func:`choose_tiling`.

    On a GPU, and when no tiling is forced, a case without limits (:func:`cudnn_limits`) goes to
    cuDNN's fused kernel; its ``lse`` is NaN, which nobody has asked for. Which way a case goes is
    logged once.
    """
    platform = (arguments.target or Target.here()).platform
    if platform == "gpu" and tiling is None:
        limits = cudnn_limits(arguments, return_lse=return_lse)
        _log_gpu_path(limits)
        if not limits:
            return prefill_cudnn(arguments)
    return prefill_blockwise(
        arguments, tiling=tiling or choose_tiling(arguments, platform=platform), platform=platform
    )


@functools.cache
def _log_gpu_path(limits: tuple[str, ...]) -> None:
    if limits:
        logger.info("swa_prefill: blockwise path on the GPU, cuDNN has no %s", ", ".join(limits))
    else:
        logger.info("swa_prefill: cuDNN fused attention on the GPU")


def choose_tiling(arguments: PrefillArguments, *, platform: str) -> Tiling:
    """Block sizes for the platform and the window.

    A windowed block of rows reads ``window - 1 + block_q`` keys: small blocks waste little of that,
    big ones run closer to the speed of a plain matrix product. One chunk holds all of it up to
    ``most`` keys; beyond, it is cut into equal chunks. The CPU sizes are measured (2 cores,
    AVX-512, N=16, K=8, H=128), those for a GPU keep the number of launches low.
    """
    _, num_queries, num_keys = arguments.shape
    window = arguments.window if isinstance(arguments.window, int) else None
    on_cpu = platform == "cpu"
    block_kv, most = (64, 640) if on_cpu else (256, 2048)
    if on_cpu and window is not None and window <= 1024:
        block_q = 64 if window <= 128 else 128
    else:
        block_q = 256 if on_cpu else 1024
    block_q = min(block_q, _round_up(num_queries, 8))
    block_kv = min(block_kv, _round_up(num_keys, 8))
    blocks = _reach(arguments, block_q=block_q, block_kv=block_kv)
    num_chunks = -(-blocks * block_kv // most)
    return Tiling(block_q=block_q, block_kv=block_kv, chunk_blocks=-(-blocks // num_chunks))


def _reach(arguments: PrefillArguments, *, block_q: int, block_kv: int) -> int:
    """Most key blocks, sinks aside, that a block of rows reads if none of its rows is full."""
    blocks = -(-arguments.shape[2] // block_kv)
    if not isinstance(arguments.window, int):
        return blocks
    # One more if a block of rows may begin inside a block of keys.
    offset = arguments.q_offset
    aligned = isinstance(offset, int) and offset % block_kv == 0 and block_q % block_kv == 0
    reach = -(-(arguments.window - 1) // block_kv) + -(-block_q // block_kv)
    return min(blocks, reach + (0 if aligned else 1))


def prefill_blockwise(
    arguments: PrefillArguments, *, tiling: Tiling, platform: str
) -> AttentionOutput:
    """Lay the arrays out in blocks, run the loops, and take the padding rows away."""
    num_queries, num_keys = arguments.shape[1:]
    rows = arguments.rows()
    windowed = arguments.window is not None
    sinks = arguments.num_sink_tokens
    reach = -(-num_keys // tiling.block_kv)
    if rows.q_full is None:
        reach = _reach(arguments, block_q=tiling.block_q, block_kv=tiling.block_kv)
    static = Static(
        tiling=tiling,
        scale=float(arguments.scale),
        softcap=None if arguments.softcap is None else float(arguments.softcap),
        is_full=not windowed,
        one_chunk=reach <= tiling.chunk_blocks,
        has_sinks=windowed and not (isinstance(sinks, int) and sinks == 0),
        precision=lax.Precision.HIGHEST if arguments.q.dtype == jnp.float32 else None,
    )
    # Up to a chunk beyond the last block may be read (and masked): leave that much room.
    k_pad = _round_up(num_keys, tiling.block_kv) - num_keys + tiling.chunk
    # The CPU's low-precision products are slow, and float32 holds their inputs exactly.
    dtype = jnp.float32 if platform == "cpu" else arguments.q.dtype
    q, k, v = (x.astype(dtype) for x in without_padding(arguments, rows))
    k, v = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, k_pad), (0, 0))) for x in (k, v))
    result = _compiled_attention(
        static,
        _to_blocks(q, block_q=tiling.block_q, num_kv_heads=k.shape[1]),
        k,
        v,
        _step_rows(arguments, rows, tiling),
        _key_rows(rows, num_keys=num_keys, k_pad=k_pad),
    )
    out, lse = cast(tuple[Array, Array], result)
    from_blocks = functools.partial(
        _from_blocks,
        num_groups=q.shape[2] // k.shape[1],
        num_batch=q.shape[0],
        num_queries=num_queries,
    )
    valid_BT1 = rows.q_valid[:, :, None]
    return AttentionOutput(
        out=jnp.where(valid_BT1[..., None], from_blocks(out), 0).astype(arguments.q.dtype),
        lse=jnp.where(valid_BT1, from_blocks(lse[..., None])[..., 0], -jnp.inf),
    )


def _step_rows(arguments: PrefillArguments, rows: RowInfo, tiling: Tiling) -> StepRows:
    """What each scan step reads; batch rows one after another, blocks of one row in order."""
    num_batch, num_queries, num_keys = arguments.shape
    num_blocks = -(-num_queries // tiling.block_q)
    window = num_keys if arguments.window is None else arguments.window

    def to_steps(x_BT: Array, fill: int) -> Array:
        pad = num_blocks * tiling.block_q - num_queries
        x_BT = jnp.pad(x_BT, ((0, 0), (0, pad)), constant_values=fill)
        return x_BT.reshape(num_batch * num_blocks, tiling.block_q)

    def per_step(value_B: Int[Array, "#B"]) -> Int[Array, " steps"]:
        return jnp.repeat(jnp.broadcast_to(value_B, (num_batch,)), num_blocks)

    blocks = block_map(
        rows,
        window=arguments.window,
        num_sink_tokens=arguments.num_sink_tokens,
        block_q=tiling.block_q,
        block_kv=tiling.block_kv,
    )
    return StepRows(
        batch=per_step(jnp.arange(num_batch, dtype=jnp.int32)),
        q_pos=to_steps(rows.q_pos, 0),
        q_full=None if rows.q_full is None else to_steps(rows.q_full, False),
        q_segment=None if rows.q_segment is None else to_steps(rows.q_segment, -1),
        window=per_step(per_row(window)),
        num_sink_tokens=per_step(per_row(arguments.num_sink_tokens)),
        blocks=jax.tree.map(jnp.ravel, blocks),
    )


def _key_rows(rows: RowInfo, *, num_keys: int, k_pad: int) -> KeyRows:
    """Positions and segments of the keys, padded with what no query row has."""
    if rows.k_start is None or rows.k_segment is None:
        return KeyRows(k_pos=None, k_segment=None)
    k_pos_BS = jnp.arange(num_keys, dtype=jnp.int32) - rows.k_start
    pad = ((0, 0), (0, k_pad))
    return KeyRows(
        k_pos=jnp.pad(k_pos_BS, pad, constant_values=num_keys),
        k_segment=jnp.pad(rows.k_segment, pad, constant_values=-2),
    )


def _to_blocks(
    q: Float[Array, "B T N H"], *, block_q: int, num_kv_heads: int
) -> Float[Array, "steps K R H"]:
    """Blocks of rows, with the G query heads of one KV head stacked: R = G * block_q."""
    num_batch, num_queries, num_heads, head_dim = q.shape
    num_blocks = -(-num_queries // block_q)
    q = jnp.pad(q, ((0, 0), (0, num_blocks * block_q - num_queries), (0, 0), (0, 0)))
    num_groups = num_heads // num_kv_heads
    q = q.reshape(num_batch, num_blocks, block_q, num_kv_heads, num_groups, head_dim)
    q = q.transpose(0, 1, 3, 4, 2, 5)  # B, block, K, G, row, H
    return q.reshape(num_batch * num_blocks, num_kv_heads, num_groups * block_q, head_dim)


def _from_blocks(
    x: Float[Array, "steps K R H"], *, num_groups: int, num_batch: int, num_queries: int
) -> Float[Array, "B T N H"]:
    """The inverse of :func:`_to_blocks`, without its padding."""
    _, num_kv_heads, num_rows, head_dim = x.shape
    x = x.reshape(num_batch, -1, num_kv_heads, num_groups, num_rows // num_groups, head_dim)
    x = x.transpose(0, 1, 4, 2, 3, 5)  # B, block, row, K, G, H
    return x.reshape(num_batch, -1, num_kv_heads * num_groups, head_dim)[:, :num_queries]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
