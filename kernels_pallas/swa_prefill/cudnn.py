"""The ``cudnn`` backend: cuDNN's fused attention through ``jax.nn``, where that is exact.

It knows causal rows, a window and lengths. Three more things are made from these:

* sinks besides a window: chunks of queries become rows of a batch, each with the keys it can see::

      queries          . . . . [ chunk ] . .
      keys    [sinks] . [ window ][ chunk ]        one softmax over [sinks | window | chunk]

  under a mask, which is small since a chunk's keys are few. Where queries are the end of a longer
  sequence, the keys of all chunks are cut out of it at each row's own, perhaps traced, offset.
* full rows that are the end of a longer sequence: a mask besides the real keys, the first ones, of
  which as many are read as the longest row needs, rounded up to a power of two::

      keys    [ before | queries' own ] . . . .    lax.switch: T, 2T, 4T, ... S of them

  Rows that begin at 0 need no mask: that is a branch of its own.
* full rows in a windowed layer: a full pass besides the windowed one, and each row takes its own of
  the two.
"""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import pad_end, round_up
from kernels_pallas.mask import RowInfo, per_row, rows_at, visible
from kernels_pallas.swa_prefill.arguments import (
    AttentionOutput,
    PrefillArguments,
    without_padding,
)

Implementation: TypeAlias = Literal["cudnn", "xla"]

_MULTIPLE = 64
"""Queries, sink keys and keys under a mask are padded to multiples of it."""

_MAX_PAIRS = 2**31
"""Entries that a mask of full rows may have; it takes two bytes for each."""


def limits(arguments: PrefillArguments) -> tuple[str, ...]:
    """What cuDNN cannot compute exactly, or only with a mask beyond all bounds."""
    dtype, head_dim = arguments.q.dtype, arguments.q.shape[3]
    num_batch, num_queries, num_keys = arguments.shape
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
    has_full_rows = arguments.window is None or arguments.q_full is not None
    pairs = num_batch * num_queries * num_keys
    if has_full_rows and not _is_at_start(arguments) and pairs > _MAX_PAIRS:
        found.append(
            f"q_offset: expected 0, or at most {_MAX_PAIRS} pairs of a query and a key, got {pairs}"
        )
    if arguments.return_lse:
        found.append("return_lse: expected False, got True (jax.nn rounds it to q's dtype)")
    return tuple(found)


def _is_at_start(arguments: PrefillArguments) -> bool:
    """Whether every row's first query is known to be the first of its sequence."""
    return isinstance(arguments.q_offset, int) and arguments.q_offset == 0


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
    num_queries, num_keys = arguments.shape[1:]
    if _is_at_start(arguments) and num_keys > num_queries:  # no query sees the keys behind it
        k, v = arguments.k[:, :num_queries], arguments.v[:, :num_queries]
        arguments = dataclasses.replace(arguments, k=k, v=v)
    rows = arguments.rows()
    if arguments.window is None:
        out = _full(arguments, rows, implementation)
    else:
        out = _windowed(arguments, rows, implementation)
        if rows.q_full is not None:
            everything = _full(dataclasses.replace(arguments, window=None), rows, implementation)
            out = jnp.where(rows.q_full[:, :, None, None], everything, out)
    if arguments.lengths is not None:
        out = jnp.where(rows.q_valid[:, :, None, None], out, 0)
    return AttentionOutput(out=out, lse=jnp.full(out.shape[:3], jnp.nan, jnp.float32))


def _fused(
    arguments: PrefillArguments, rows: RowInfo, implementation: Implementation
) -> Float[Array, "B T N H"]:
    """Rows that begin at 0, without sinks: what cuDNN knows."""
    return jax.nn.dot_product_attention(
        *without_padding(arguments, rows), implementation=implementation, **keywords_of(arguments)
    )


def _full(
    arguments: PrefillArguments, rows: RowInfo, implementation: Implementation
) -> Float[Array, "B T N H"]:
    """Attention to everything before, wherever the rows begin."""
    if _is_at_start(arguments):
        return _fused(arguments, rows, implementation)
    _, num_queries, num_keys = arguments.shape
    padding = -num_queries % _MULTIPLE
    end_B = _end_of_seen(rows)

    def from_start(q: Array, k: Array, v: Array) -> Array:
        k, v = k[:, :num_queries], v[:, :num_queries]
        first = dataclasses.replace(arguments, q=q, k=k, v=v, q_offset=0)
        return _fused(first, first.rows(), implementation)

    def masked(size: int, q: Array, k: Array, v: Array) -> Array:
        k_pos = jnp.arange(size)
        k, v = (
            _zeroed(pad_end(x[:, :size], max(0, size - num_keys), axis=1), k_pos[None], end_B)
            for x in (k, v)
        )
        q_index = pad_end(rows.q_index, padding, axis=1)
        out = jax.nn.dot_product_attention(
            pad_end(q, padding, axis=1),
            k,
            v,
            mask=visible(q_index[:, :, None], k_pos, window=None)[:, None],
            key_value_seq_lengths=jnp.clip(end_B, 1, size),
            scale=float(arguments.scale),
            implementation=implementation,
        )
        return out[:, :num_queries]

    sizes = [num_queries + padding]
    while sizes[-1] < num_keys:
        sizes.append(min(2 * sizes[-1], round_up(num_keys, _MULTIPLE)))
    enough = jnp.sum(jnp.max(end_B) > jnp.array(sizes[:-1], jnp.int32))
    branch = jnp.where(jnp.all(per_row(arguments.q_offset) == 0), 0, 1 + enough)
    branches = [from_start, *(functools.partial(masked, size) for size in sizes)]
    q, _, _ = without_padding(arguments, rows)
    return lax.switch(branch, branches, q, arguments.k, arguments.v)


def _windowed(
    arguments: PrefillArguments, rows: RowInfo, implementation: Implementation
) -> Float[Array, "B T N H"]:
    """Attention with a window, and perhaps sinks."""
    num_batch, num_queries, num_keys = arguments.shape
    window, num_sinks = arguments.window, arguments.num_sink_tokens
    assert isinstance(window, int) and isinstance(num_sinks, int)
    at_start = _is_at_start(arguments)
    if at_start and num_sinks == 0:
        return _fused(arguments, rows, implementation)
    # A row computes up to a chunk more keys than it sees, and keys are copied once for each chunk
    # of a window: a quarter of the window is between the two.
    chunk = max(_MULTIPLE, round_up(window // 4, _MULTIPLE))
    chunk = min(chunk, round_up(num_queries, _MULTIPLE))
    before = -(-min(window - 1, num_keys) // chunk)  # chunks that a window reaches back
    num_chunks = -(-num_queries // chunk)
    num_near = (before + 1) * chunk
    num_far = min(round_up(num_sinks, _MULTIPLE), round_up(num_keys, _MULTIPLE))
    offset_B = jnp.broadcast_to(per_row(arguments.q_offset), (num_batch,))
    end_B = _end_of_seen(rows)
    is_clean = at_start and arguments.lengths is None
    far_pos, cut = jnp.arange(num_far), (before + num_chunks) * chunk
    cut_pos = offset_B[:, None] - before * chunk + jnp.arange(cut)

    def zeroed(x: Array, positions: Array) -> Array:
        return x if is_clean else _zeroed(x, positions, end_B)

    def keys(x: Float[Array, "B S K H"]) -> Float[Array, "batch keys K H"]:
        near = jnp.pad(x, ((0, 0), (before * chunk, num_chunks * chunk), (0, 0), (0, 0)))
        near = near[:, :cut] if at_start else rows_at(near, offset_B, cut)
        near = zeroed(near, cut_pos).reshape(num_batch, -1, chunk, *x.shape[2:])
        near = [near[:, shift : shift + num_chunks] for shift in range(before + 1)]
        far = zeroed(pad_end(x, max(0, num_far - num_keys), axis=1)[:, :num_far], far_pos[None])
        far = jnp.broadcast_to(far[:, None], (num_batch, num_chunks, *far.shape[1:]))
        both = jnp.concatenate([far, *near], axis=2)
        return both.reshape(num_batch * num_chunks, *both.shape[2:])

    starts = offset_B[:, None, None, None] + chunk * jnp.arange(num_chunks)[:, None, None]
    q_pos = starts + jnp.arange(chunk)[:, None]
    near_pos = starts - before * chunk + jnp.arange(num_near)
    near = visible(q_pos, near_pos, window=window, num_sink_tokens=num_sinks) & (near_pos >= 0)
    # A sink among the near keys is seen there.
    far = (far_pos < num_sinks) & (far_pos < starts - before * chunk)
    mask = jnp.concatenate([jnp.broadcast_to(far, (*near.shape[:3], num_far)), near], axis=3)
    q, _, _ = without_padding(arguments, rows)
    q = pad_end(q, num_chunks * chunk - num_queries, axis=1)
    out = jax.nn.dot_product_attention(
        q.reshape(num_batch * num_chunks, chunk, *q.shape[2:]),
        keys(arguments.k),
        keys(arguments.v),
        mask=mask.reshape(num_batch * num_chunks, 1, chunk, num_far + num_near),
        scale=float(arguments.scale),
        implementation=implementation,
    )
    return out.reshape(num_batch, num_chunks * chunk, *out.shape[2:])[:, :num_queries]


def _end_of_seen(rows: RowInfo) -> Int[Array, " B"]:
    """The first key of each row that none of its real queries may see."""
    return jnp.max(jnp.where(rows.q_valid, rows.q_index + 1, 0), axis=1)


def _zeroed(
    x: Float[Array, "B S K H"], positions: Int[Array, "#B S"], end_B: Int[Array, " B"]
) -> Float[Array, "B S K H"]:
    """Keys or values with zeros from the row's end on, where they may hold anything."""
    return jnp.where((positions < end_B[:, None])[:, :, None, None], x, 0)
