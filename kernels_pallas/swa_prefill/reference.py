"""The dense oracle: all scores at once, plain jnp. Memory O(T S); for tests and small inputs."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.backends import no_limits
from kernels_pallas.mask import per_row, visible
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill.arguments import PrefillArguments

limits = no_limits


def compute(arguments: PrefillArguments) -> AttentionOutput:
    """Attention with a materialised mask and scores; the LSE is always filled in."""
    num_batch, num_queries, num_keys = arguments.shape
    rows = arguments.rows()
    index_S = jnp.arange(num_keys, dtype=jnp.int32)[None]
    k_pos_BS = index_S if rows.k_start is None else index_S - rows.k_start
    segments = {}
    if rows.q_segment is not None and rows.k_segment is not None:
        segments = {
            "q_segment": rows.q_segment[:, :, None],
            "k_segment": rows.k_segment[:, None, :],
        }
    window = arguments.window
    mask_BTS = rows.q_valid[:, :, None] & visible(
        rows.q_pos[:, :, None],
        k_pos_BS[:, None, :],
        window=None if window is None else per_row(window)[:, None, None],
        num_sink_tokens=per_row(arguments.num_sink_tokens)[:, None, None],
        q_full=False if rows.q_full is None else rows.q_full[:, :, None],
        **segments,
    )

    num_kv_heads = arguments.k.shape[2]
    q_BTKGH = arguments.q.astype(jnp.float32).reshape(
        num_batch, num_queries, num_kv_heads, -1, arguments.q.shape[3]
    )
    # Keys and values that no row sees may hold NaN, and NaN * 0 is NaN: take them out first.
    seen_BS11 = jnp.any(mask_BTS, axis=1)[:, :, None, None]
    k = jnp.where(seen_BS11, arguments.k.astype(jnp.float32), 0.0)
    v = jnp.where(seen_BS11, arguments.v.astype(jnp.float32), 0.0)
    q_BTKGH = jnp.where(rows.q_valid[:, :, None, None, None], q_BTKGH, 0.0)

    scores = arguments.scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k, precision=lax.Precision.HIGHEST
    )
    if arguments.softcap is not None:
        scores = arguments.softcap * jnp.tanh(scores / arguments.softcap)
    # A padding row has no visible key: give it scores of zero, then take its results away.
    mask = mask_BTS[:, None, None]
    some_BKGT = rows.q_valid[:, None, None, :]
    scores = jnp.where(mask, scores, jnp.where(some_BKGT[..., None], -jnp.inf, 0.0))
    lse_BKGT = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(mask, jnp.exp(scores - lse_BKGT[..., None]), 0.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=lax.Precision.HIGHEST)
    lse_BKGT = jnp.where(some_BKGT, lse_BKGT, -jnp.inf)
    return AttentionOutput(
        out=out.reshape(arguments.q.shape).astype(arguments.q.dtype),
        lse=lse_BKGT.transpose(0, 3, 1, 2).reshape(arguments.q.shape[:3]),
    )
