"""Full layers with more keys than a device can gather: keys and values pass round a ring.

At step s a device has the keys of the shard s before its own, and hands them to the next device::

    step    device 0   1   2   3
    0              0   1   2   3        its own keys: what `swa_prefill` computes
    1              .   0   1   2        those of a shard before: all are seen, if segments allow it
    2              .   .   0   1        '.' those of a later shard: none is seen, nothing to do
    3              .   .   .   0

Kernels have no rows that do not see their own key, so each step has those beside the others, with
values of zero; what they add to the sum of weights is known, and taken out of it. Windows of 1 and
sinks that are the whole shard, C = 4, row 2::

    keys    [ 4 5 6 7 | 12 13 14 15 ]       out * exp(lse)       the others' share of the values
    seen      x x x x    .  .  o  .         exp(lse) - exp(o)    and of the weights

A row's own key is among those of step 0, so that the difference loses nothing that counts. Given
up: steps are causal, and the first devices wait for the last; gathered keys are worked through
evenly.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import SAVED, AttentionOutput
from swaa_jax.attention.shards import Shards

__all__ = ["attend_ring"]

_NEVER = jnp.inf
"""In place of the log-sum-exp of a row that sees nothing: its weights are zero."""


def attend_ring(
    kernel: Callable[..., Any],
    q: Float[Array, "b C N H"],
    k: Float[Array, "b C K H"],
    v: Float[Array, "b C K H"],
    rows: dict[str, Array],
    *,
    shards: Shards,
) -> Float[Array, "b C N H"]:
    """Attention of a device's own tokens to all earlier ones of their rows.

    The gradient is a sum over steps, each with the whole's output and log-sum-exp, so that keys,
    values and their gradients go round once more, and no device ever holds more than two shards.

    Args:
        kernel: `swa_prefill` with all that is the same for all tokens.
        q, k, v: this device's.
        rows: what there is of `lengths`, how many of this device's tokens are real `[b]`, and
            `starts`, the token at which each one's segment begins `[b, C]`.
        shards: how the rows are split.
    """
    size, count = shards.size, shards.count
    onward = {device: (device + 1) % count for device in range(count)}

    def own(q: Array, k: Array, v: Array, rows: dict[str, Array]) -> AttentionOutput:
        return kernel(
            q,
            k,
            v,
            lengths=rows.get("lengths"),
            segment_ids=rows.get("starts"),
            return_lse=True,
        )

    def shard_before(
        q: Array, k: Array, v: Array, own_k: Array, rows: dict[str, Array], first: Array
    ) -> tuple[Array, Array, Array]:
        """Output and log-sum-exp with the rows' own keys, and the score of those alone."""
        known: dict[str, Any] = {"num_sink_tokens": size}
        reaches = True
        if "starts" in rows:
            reaches, known = _segments_of(rows["starts"], first)
        lengths = rows.get("lengths")
        one = functools.partial(kernel, window=1, return_lse=True)
        found = one(
            q,
            jnp.concatenate([k, own_k], axis=1),
            jnp.concatenate([v, jnp.zeros_like(v)], axis=1),
            q_offset=size,
            lengths=None if lengths is None else size + lengths,
            **known,
        )
        alone = one(q, own_k, jnp.zeros_like(v), lengths=lengths).lse
        return (
            found.out,
            jnp.where(reaches, found.lse, -jnp.inf),
            jnp.where(reaches, alone, -jnp.inf),
        )

    def forward(q: Array, k: Array, v: Array, rows: dict[str, Array]) -> tuple[Array, Array]:
        found, index = own(q, k, v, rows), shards.index

        def step(number: Array, carry: Any) -> Any:
            (k_there, v_there), sums = carry
            k_there, v_there = shards.send((k_there, v_there), onward)

            def taken() -> tuple[Array, Array]:
                first = (index - number) * size
                return _with_part(sums, shard_before(q, k_there, v_there, k, rows, first))

            return (k_there, v_there), jax.lax.cond(number <= index, taken, lambda: sums)

        start = ((k, v), (found.out.astype(jnp.float32), found.lse))
        _, (out, lse) = jax.lax.fori_loop(1, count, step, start)
        return checkpoint_name((out.astype(q.dtype), lse), SAVED)

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, rows: dict[str, Array]) -> Array:
        return forward(q, k, v, rows)[0]

    def attend_forward(q: Array, k: Array, v: Array, rows: dict[str, Array]) -> tuple[Array, Any]:
        out, lse = forward(q, k, v, rows)
        return out, (q, k, v, rows, out, lse)

    def attend_backward(saved: Any, d_out: Array) -> Any:
        q, k, v, rows, out, lse = saved
        index = shards.index
        lse = jnp.where(jnp.isfinite(lse), lse, _NEVER)
        d_out, out = d_out.astype(jnp.float32), out.astype(jnp.float32)

        def share(found_out: Array, found_lse: Array, alone: Array) -> Array:
            """Has the gradient that this step's keys add; `out` and `lse` are constants to it."""
            moved = jnp.exp(found_lse - lse)[..., None] * (found_out - out)
            return jnp.sum(d_out * (moved + jnp.exp(alone - lse)[..., None] * out))

        def own_share(q: Array, k: Array, v: Array) -> Array:
            found = own(q, k, v, rows)
            return share(found.out, found.lse, jnp.full_like(found.lse, -jnp.inf))

        def step(number: Array, carry: Any) -> Any:
            passed, mine = carry
            passed = shards.send(passed, onward)

            def added() -> Any:
                def of(q: Array, k: Array, v: Array, own_k: Array) -> Array:
                    first = (index - number) * size
                    return share(*shard_before(q, k, v, own_k, rows, first))

                (q_k_v, sums) = (q, *passed[:2], k), (mine[0], *passed[2:], mine[1])
                more = jax.grad(of, argnums=(0, 1, 2, 3))(*q_k_v)
                d_q, d_k, d_v, d_own = map(jnp.add, sums, more)
                return (*passed[:2], d_k, d_v), (d_q, d_own)

            return jax.lax.cond(number <= index, added, lambda: (passed, mine))

        d_q, d_k, d_v = jax.grad(own_share, argnums=(0, 1, 2))(q, k, v)
        nothing = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
        start = ((k, v, *nothing), (d_q.astype(jnp.float32), d_k.astype(jnp.float32)))
        passed, (d_q, d_k) = jax.lax.fori_loop(1, count, step, start)
        *_, others_k, others_v = shards.send(passed, onward)  # home
        d_k, d_v = d_k + others_k, d_v.astype(jnp.float32) + others_v
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None

    attend.defvjp(attend_forward, attend_backward)
    return attend(q, k, v, rows)


def _segments_of(
    starts: Int[Array, "b C"], first: Int[Array, ""]
) -> tuple[Array, dict[str, Array]]:
    """Which rows see keys of the shard that begins at token `first`, and which of them.

    Only the segment of a shard's first row can be there; other rows are alone, each a segment. Its
    sinks are all that it has there::

        segments    a a b b | b b c c c         before, and own
        numbers     0 0 1 1 | 1 1 2 3 2         2 sinks: they end where own keys begin
    """
    size = starts.shape[1]
    begin_B1 = starts[:, :1]
    start_B1 = jnp.clip(begin_B1 - first, 0, size)
    is_crossing = starts == begin_B1
    index = jnp.arange(size, dtype=jnp.int32)
    before = jnp.broadcast_to(index >= start_B1, starts.shape).astype(jnp.int32)
    own = jnp.where(is_crossing, 1, 2 + index % 2)
    known = {
        "segment_ids": jnp.concatenate([before, own], axis=1),
        "num_sink_tokens": size - start_B1[:, 0],
    }
    return (is_crossing & (start_B1 < size))[:, :, None], known


def _with_part(sums: tuple[Array, Array], more: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Output `[b, C, N, H]` and log-sum-exp `[b, C, N]` with one more part's.

    The part's weights have `exp(alone)` too many.
    """
    (out, lse), (part, part_lse, alone) = sums, more
    largest = jnp.maximum(lse, part_lse)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    before, with_own = jnp.exp(lse - largest), jnp.exp(part_lse - largest)
    total = before + jnp.maximum(with_own - jnp.exp(alone - largest), 0)
    divisor = jnp.where(total > 0, total, 1)[..., None]
    out = (before[..., None] * out + with_own[..., None] * part) / divisor
    return out, jnp.where(total > 0, largest + jnp.log(divisor[..., 0]), -jnp.inf)
