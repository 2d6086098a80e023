"""The ``xla`` backend: blockwise attention on any device; cuDNN on a GPU where it fits exactly."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.backends import register_backend
from kernels_pallas.mask import block_map, per_row
from kernels_pallas.swa_prefill.arguments import AttentionOutput, PrefillArguments
from kernels_pallas.swa_prefill.blockwise import (
    KeyRows,
    Static,
    StepRows,
    Tiling,
    blockwise_attention,
)
from kernels_pallas.swa_prefill.cudnn import cudnn_limits, prefill_cudnn


@register_backend("swa_prefill", "xla")
def prefill_xla(
    arguments: PrefillArguments,
    *,
    return_lse: bool,
    block_q: int | None = None,
    block_kv: int | None = None,
    chunk_blocks: int | None = None,
) -> AttentionOutput:
    """Blockwise attention; sizes that are not given come from :func:`choose_tiling`.

    On a GPU, and with no size forced, a case without limits (:func:`cudnn_limits`) goes to cuDNN's
    fused kernel, whose log-sum-exp is not returned (``lse`` is then NaN: it was not asked for).
    """
    platform = jax.default_backend()
    forced = block_q is not None or block_kv is not None or chunk_blocks is not None
    if platform == "gpu" and not forced and not cudnn_limits(arguments, return_lse=return_lse):
        return prefill_cudnn(arguments)
    tiling = choose_tiling(arguments, platform=platform)
    tiling = Tiling(
        block_q=block_q or tiling.block_q,
        block_kv=block_kv or tiling.block_kv,
        chunk_blocks=chunk_blocks or (1 if forced else tiling.chunk_blocks),
    )
    return prefill_blockwise(arguments, tiling=tiling, platform=platform)


def choose_tiling(arguments: PrefillArguments, *, platform: str) -> Tiling:
    """Block sizes for the platform and the window."""
    _, num_queries, num_keys = arguments.shape
    block_q, block_kv, most = (256, 128, 1024) if platform == "cpu" else (1024, 256, 2048)
    block_q = min(block_q, _round_up(num_queries, 8))
    block_kv = min(block_kv, _round_up(num_keys, 8))
    # A windowed row block reads window - 1 + block_q keys: one chunk holds them when it can.
    reach = num_keys
    if isinstance(arguments.window, int):
        reach = min(reach, arguments.window - 1 + block_q)
    return Tiling(
        block_q=block_q,
        block_kv=block_kv,
        chunk_blocks=-(-min(reach, most) // block_kv),
    )


def prefill_blockwise(
    arguments: PrefillArguments, *, tiling: Tiling, platform: str
) -> AttentionOutput:
    """Lay the arrays out in blocks, run the loops, and take the padding rows away."""
    num_batch, num_queries, num_keys = arguments.shape
    num_heads, head_dim = arguments.q.shape[2:]
    num_kv_heads = arguments.k.shape[2]
    rows = arguments.rows()
    # XLA:CPU has no fast low-precision product; f32 also makes p v and the gradients exact there.
    dtype = jnp.float32 if platform == "cpu" else arguments.q.dtype

    is_full = arguments.window is None
    static = Static(
        tiling=tiling,
        scale=float(arguments.scale),
        softcap=None if arguments.softcap is None else float(arguments.softcap),
        is_full=is_full,
        has_sinks=not is_full
        and not (isinstance(arguments.num_sink_tokens, int) and arguments.num_sink_tokens == 0),
        precision=lax.Precision.HIGHEST if arguments.q.dtype == jnp.float32 else None,
    )
    num_blocks = -(-num_queries // tiling.block_q)
    q_pad = num_blocks * tiling.block_q - num_queries
    k_pad = _round_up(num_keys, tiling.block_kv) - num_keys + tiling.chunk

    def to_steps(x_BT: Array | None, fill: int) -> Array | None:
        """[B, T] to [B * num_blocks, block_q]."""
        if x_BT is None:
            return None
        x_BT = jnp.pad(x_BT, ((0, 0), (0, q_pad)), constant_values=fill)
        return x_BT.reshape(num_batch * num_blocks, tiling.block_q)

    blocks = block_map(
        rows,
        window=arguments.window,
        num_sink_tokens=arguments.num_sink_tokens,
        block_q=tiling.block_q,
        block_kv=tiling.block_kv,
    )

    def per_step(value_B: Array) -> Array:
        return jnp.repeat(jnp.broadcast_to(value_B, (num_batch,)), num_blocks)

    steps = StepRows(
        batch=per_step(jnp.arange(num_batch, dtype=jnp.int32)),
        q_pos=to_steps(rows.q_pos, 0),
        q_full=to_steps(rows.q_full, False),
        q_segment=to_steps(rows.q_segment, -1),
        window=per_step(per_row(num_keys if is_full else arguments.window)),
        num_sink_tokens=per_step(per_row(arguments.num_sink_tokens)),
        blocks=jax.tree.map(jnp.ravel, blocks),
    )
    keys = KeyRows(k_pos=None, k_segment=None)
    if rows.k_start is not None and rows.k_segment is not None:
        k_pos_BS = jnp.arange(num_keys, dtype=jnp.int32) - rows.k_start
        keys = KeyRows(
            k_pos=jnp.pad(k_pos_BS, ((0, 0), (0, k_pad)), constant_values=num_keys),
            k_segment=jnp.pad(rows.k_segment, ((0, 0), (0, k_pad)), constant_values=-2),
        )

    # Padding may hold anything, NaN too, and NaN * 0 is NaN: zero what no valid row may see.
    q, k, v = arguments.q, arguments.k, arguments.v
    if arguments.lengths is not None:
        q = jnp.where(rows.q_valid[:, :, None, None], q, 0)
    if arguments.lengths is not None or num_keys > num_queries:
        last_B = jnp.max(jnp.where(rows.q_valid, rows.q_index, -1), axis=1)
        reached_BS = jnp.arange(num_keys) <= last_B[:, None]
        k = jnp.where(reached_BS[:, :, None, None], k, 0)
        v = jnp.where(reached_BS[:, :, None, None], v, 0)

    q = jnp.pad(q.astype(dtype), ((0, 0), (0, q_pad), (0, 0), (0, 0)))
    split = (
        num_batch,
        num_blocks,
        tiling.block_q,
        num_kv_heads,
        num_heads // num_kv_heads,
        head_dim,
    )
    q = q.reshape(split).transpose(0, 1, 3, 4, 2, 5)  # B, block, K, G, row, H
    q = q.reshape(num_batch * num_blocks, num_kv_heads, -1, head_dim)
    k, v = (
        jnp.pad(x.astype(dtype).transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, k_pad), (0, 0)))
        for x in (k, v)
    )
    out, lse = blockwise_attention(static, q, k, v, steps, keys)

    def from_steps(x: Float[Array, "steps K R ..."]) -> Array:
        """[steps, K, G * block_q, ...] to [B, T, N, ...]."""
        trailing = x.shape[3:]
        x = x.reshape(num_batch, num_blocks, num_kv_heads, -1, tiling.block_q, *trailing)
        x = jnp.moveaxis(x, 4, 2)  # B, block, row, K, G
        x = x.reshape(num_batch, num_blocks * tiling.block_q, num_heads, *trailing)
        return x[:, :num_queries]

    valid_BT1 = rows.q_valid[:, :, None]
    return AttentionOutput(
        out=jnp.where(valid_BT1[..., None], from_steps(out), 0).astype(arguments.q.dtype),
        lse=jnp.where(valid_BT1, from_steps(lse), -jnp.inf),
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
