"""The ``cudnn`` backend: cuDNN's fused attention through ``jax.nn``, where that is exact.

It knows causal rows, a window and lengths. Two more things are made from these:

* sinks besides a window: chunks of queries become rows of a batch, each with the keys it can see::

      queries          . . . . [ chunk ] . .
      keys    [sinks] . [ window ][ chunk ]        one softmax over [sinks | window | chunk]

  under a mask, which is small since a chunk's keys are few.
* full rows in a windowed layer: a causal pass besides the windowed one, and each
  row takes its own of the two.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.layout import pad_end, round_up
from kernels_pallas.mask import visible
from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill.arguments import PrefillArguments

Implementation: TypeAlias = Literal["cudnn", "xla"]

_MULTIPLE = 64
"""Queries in a chunk, and sink keys that are put before its own, are padded to multiples of it."""


def limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """What cuDNN cannot compute exactly."""
    dtype, head_dim = arguments.q.dtype, arguments.q.shape[3]
    _, num_queries, num_keys = arguments.shape
    found = []
    if dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"q: expected bfloat16 or float16, got {dtype}")
    if head_dim > 128 or head_dim % 8:
        found.append(f"q: expected a head dim of at most 128, in steps of 8, got {head_dim}")
    if arguments.window is not None:
        for name in ("window", "num_sink_tokens"):
            if not isinstance(getattr(arguments, name), int):
                found.append(f"{name}: expected an int, got an array")
    if arguments.segment_ids is not None:
        found.append("segment_ids: expected None, got an array")
    if arguments.softcap is not None:
        found.append(f"softcap: expected None, got {arguments.softcap}")
    if not (isinstance(arguments.q_offset, int) and arguments.q_offset == 0):
        found.append("q_offset: expected 0, got another one or an array")
    if num_queries != num_keys:
        found.append(f"k: expected as many keys as queries, {num_queries}, got {num_keys}")
    if arguments.return_lse:
        found.append("return_lse: expected False, got True (jax.nn rounds it to q's dtype)")
    return tuple(found)


def keywords_of(arguments: PrefillArguments) -> dict[str, Any]:
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


def compute(
    arguments: PrefillArguments, *, implementation: Implementation = "cudnn"
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
    clean = dataclasses.replace(arguments, q=q, k=k, v=v)
    folded = arguments.window is not None and arguments.num_sink_tokens > 0
    out = (_folded if folded else _fused)(clean, implementation)
    full_BT = None if arguments.window is None else arguments.rows().q_full
    if full_BT is not None:
        everything = _fused(dataclasses.replace(clean, window=None), implementation)
        out = jnp.where(full_BT[:, :, None, None], everything, out)
    if valid is not None:
        out = jnp.where(valid[:, :, None, None], out, 0)
    return AttentionOutput(out=out, lse=jnp.full(out.shape[:3], jnp.nan, jnp.float32))


def _fused(arguments: PrefillArguments, implementation: Implementation) -> Float[Array, "B T N H"]:
    q, k, v = arguments.q, arguments.k, arguments.v
    return jax.nn.dot_product_attention(
        q, k, v, implementation=implementation, **keywords_of(arguments)
    )


def _folded(arguments: PrefillArguments, implementation: Implementation) -> Float[Array, "B T N H"]:
    """Attention with window and sinks; no row sees padding, which comes after all that is real."""
    num_batch, num_queries, _ = arguments.shape
    window, num_sinks = arguments.window, arguments.num_sink_tokens
    assert isinstance(window, int) and isinstance(num_sinks, int)
    # A row computes up to a chunk more keys than it sees, and keys are copied once for each chunk
    # of a window: a quarter of the window is between the two.
    chunk = max(_MULTIPLE, round_up(window // 4, _MULTIPLE))
    before = -(-(window - 1) // chunk)  # chunks that a window reaches back
    num_chunks = -(-num_queries // chunk)
    num_near = (before + 1) * chunk
    num_far = min(round_up(num_sinks, _MULTIPLE), num_chunks * chunk)

    def chunks(x: Float[Array, "B T M H"]) -> Float[Array, "B c chunk M H"]:
        x = pad_end(x, num_chunks * chunk - num_queries, axis=1)
        return x.reshape(num_batch, num_chunks, chunk, *x.shape[2:])

    def keys(x: Float[Array, "B T K H"]) -> Float[Array, "batch S K H"]:
        own = jnp.pad(chunks(x), ((0, 0), (before, 0), (0, 0), (0, 0), (0, 0)))
        near = [own[:, shift : shift + num_chunks] for shift in range(before + 1)]
        far = pad_end(x, max(0, num_far - num_queries), axis=1)[:, :num_far]
        far = jnp.broadcast_to(far[:, None], (num_batch, num_chunks, *far.shape[1:]))
        both = jnp.concatenate([far, *near], axis=2)
        return both.reshape(num_batch * num_chunks, *both.shape[2:])

    starts = chunk * jnp.arange(num_chunks)[:, None, None]
    q_pos = starts + jnp.arange(chunk)[:, None]
    near_pos = starts - before * chunk + jnp.arange(num_near)
    near = visible(q_pos, near_pos, window=window, num_sink_tokens=num_sinks) & (near_pos >= 0)
    # A sink among the near keys is seen there.
    far_pos = jnp.arange(num_far)
    far = (far_pos < num_sinks) & (far_pos < starts - before * chunk)
    far = jnp.broadcast_to(far, (num_chunks, chunk, num_far))
    mask = jnp.concatenate([far, near], axis=2)
    queries = chunks(arguments.q)
    out = jax.nn.dot_product_attention(
        queries.reshape(num_batch * num_chunks, *queries.shape[2:]),
        keys(arguments.k),
        keys(arguments.v),
        mask=jnp.tile(mask, (num_batch, 1, 1))[:, None],
        scale=float(arguments.scale),
        implementation=implementation,
    )
    return out.reshape(num_batch, num_chunks * chunk, *out.shape[2:])[:, :num_queries]
