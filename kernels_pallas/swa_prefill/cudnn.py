"""cuDNN's fused attention through ``jax.nn``, for the cases that it expresses exactly."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.swa_prefill.arguments import AttentionOutput, PrefillArguments


def cudnn_limits(arguments: PrefillArguments, *, return_lse: bool) -> tuple[str, ...]:
    """Why cuDNN cannot compute exactly this case; empty when it can."""
    num_queries, head_dim = arguments.q.shape[1], arguments.q.shape[3]
    windowed = arguments.window is not None
    unless = {
        "float32 inputs": arguments.q.dtype not in (jnp.bfloat16, jnp.float16),
        "a head dim above 128 or not a multiple of 8": head_dim > 128 or head_dim % 8 != 0,
        "a window that is an array": windowed and not isinstance(arguments.window, int),
        "sink tokens beside a window": windowed and not _is_zero(arguments.num_sink_tokens),
        "full rows by stage in a windowed layer": windowed and arguments.stage_ids is not None,
        "a full attention tail in a windowed layer": windowed
        and not _is_zero(arguments.full_attention_tail),
        "segments": arguments.segment_ids is not None,
        "a soft cap": arguments.softcap is not None,
        "a query offset": not _is_zero(arguments.q_offset),
        "fewer queries than keys": num_queries != arguments.k.shape[1],
        "the log-sum-exp (jax.nn rounds it to the output dtype)": return_lse,
    }
    return tuple(limit for limit, applies in unless.items() if applies)


def cudnn_keywords(arguments: PrefillArguments) -> dict[str, Any]:
    """Keywords of ``jax.nn.dot_product_attention`` for ``arguments``, implementation left out.

    ``local_window_size`` is ``(left, right)`` and the left context does not count the query, so a
    window of W keys is ``(W - 1, 0)``. A length of 0 is passed as 1: cuDNN divides by the sum of
    the weights, and the caller takes padding rows away in any case.
    """
    keywords: dict[str, Any] = {"scale": float(arguments.scale), "is_causal": True}
    if arguments.window is not None:
        keywords["local_window_size"] = (arguments.window - 1, 0)
    if arguments.lengths is not None:
        lengths = jnp.clip(arguments.lengths.astype(jnp.int32), 1, arguments.q.shape[1])
        keywords["query_seq_lengths"] = lengths
        keywords["key_value_seq_lengths"] = lengths
    return keywords


def prefill_cudnn(
    arguments: PrefillArguments, *, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> AttentionOutput:
    """Attention through ``jax.nn``; ``lse`` is NaN. Gradients are cuDNN's own.

    Padding is zeroed on the way in and on the way out: what it holds then never reaches a product,
    and ``where`` takes its gradients away as well.
    """
    q, k, v = arguments.q, arguments.k, arguments.v
    valid = None
    if arguments.lengths is not None:
        valid = jnp.arange(q.shape[1]) < arguments.lengths[:, None]
        q, k, v = (jnp.where(valid[:, :, None, None], x, 0) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, implementation=implementation, **cudnn_keywords(arguments)
    )
    if valid is not None:
        out = jnp.where(valid[:, :, None, None], out, 0)
    return AttentionOutput(out=out, lse=jnp.full(out.shape[:3], jnp.nan, jnp.float32))


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0
