"""Whole rows whose tokens are split over devices, and what the devices send to one another.

Shard i holds tokens `[i C, (i + 1) C)`. Its queries need its own keys and some of the shards
before it. Window 4, 2 sinks, C = 4::

    token       0 1 2 3 | 4 5 6 7 | 8 9 . .         a windowed layer: whatever the length of a row,
    shard 2     s s           h h h o o o o         the sinks, and the W - 1 tokens before its own
    as one call           [s s|h h h|o o o o]       to `swa_prefill`: the keys in order, those that
                                    ^ q_offset      no query sees left out

Leaving tokens out moves no distance within the window, and the sinks are the first tokens of what
is left: visibility counts indices, and holds as it is (a ring cache is read the same way). With
several segments the sinks are those of the segment that crosses the shard's border; one that begins
later has its own among the keys. Slots that have no token are a segment of their own::

    segments    a a a a | a b b b | b b b c         sinks of b; b begins 3 tokens before the halo
    begins at token 1   [. b|b b b|b b b c]         at 4: one slot is left for what lies before it

Full layers, windowed ones with rows that see everything, and those whose halo and sinks would be as
much as all other shards, gather all keys and values: of all KV heads at once, or, where that is too
much memory, of some heads in turn; where one head is too much, a full layer's go round a ring
(`ring.py`). A full layer's work grows along the row, so each device computes an early and a late
half of a shard::

    halves      0 1 | 2 3 | 4 5 | 6 7       queries of halves 0 7 | 1 6 | 2 5 | 3 4, and their
                                            results back
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas import SAVED
from kernels_pallas.layout import LANES, round_up, running_max
from swaa_jax.attention.ring import attend_ring
from swaa_jax.attention.shards import Shards

__all__ = ["attend_shard", "attend_slot_shards", "heads_at_once"]

_GATHERED_BYTES = 512 << 20

Kernel = Callable[..., Float[Array, "b C N H"]]


def attend_shard(
    kernel: Kernel,
    q: Float[Array, "b C N H"],
    k: Float[Array, "b C K H"],
    v: Float[Array, "b C K H"],
    known: dict[str, Array],
    *,
    shards: Shards,
    window: int | None,
    num_sink_tokens: int,
) -> Float[Array, "b C N H"]:
    """Attention of a device's own tokens to those of their rows on all devices.

    Args:
        kernel: `swa_prefill` with the window, the sinks and all that is the same for all tokens.
        q, k, v: this device's.
        known: what else the kernel is to know: of this device's tokens `segment_ids` and `q_full`,
            of whole rows `lengths` and traced windows.
        shards: how the rows are split.
        window: of the layer; None: it is full.
        num_sink_tokens: of the layer.
    """
    by_row = "q_full" in known or "window" in known
    if window is not None and not by_row and shards.sends_less(window, num_sink_tokens):
        return _attend_halo(
            kernel, q, k, v, known, shards=shards, window=window, num_sink_tokens=num_sink_tokens
        )
    at_once = heads_at_once(k.shape, k.dtype.itemsize, shards.count)
    if at_once == 0 and window is None and not by_row:
        rows = {}
        if "lengths" in known:
            rows["lengths"] = shards.own_lengths(known["lengths"])
        if "segment_ids" in known:
            rows["starts"] = _segment_starts(known["segment_ids"], shards)
        return attend_ring(kernel, q, k, v, rows, shards=shards)
    if "segment_ids" in known:
        known = known | {"segment_ids": shards.gather(known["segment_ids"])}
    evenly = window is None and not by_row and shards.size % 2 == 0
    attending = functools.partial(
        _attend_gathered, functools.partial(kernel, **known), shards=shards, evenly=evenly
    )
    return _by_heads(attending, q, k, v, at_once=max(at_once, 1))


# A windowed layer


def _attend_halo(
    kernel: Kernel,
    q: Float[Array, "b C N H"],
    k: Float[Array, "b C K H"],
    v: Float[Array, "b C K H"],
    known: dict[str, Array],
    *,
    shards: Shards,
    window: int,
    num_sink_tokens: int,
) -> Float[Array, "b C N H"]:
    """A windowed layer without full rows: sinks, halo and own keys in one call."""
    halo = window - 1
    # Where own tokens begin at a multiple of tiles, few of these are cut by the border.
    offset = round_up(num_sink_tokens + halo, LANES)
    starts = jnp.zeros(k.shape[:2], jnp.int32)
    if "segment_ids" in known:
        starts = _segment_starts(known["segment_ids"], shards)
    # A segment is known by the token that it begins at. 0: no token.
    keys = {"k": k, "v": v, "segment_ids": starts + 1}
    pieces = [keys]
    if halo:
        pieces.insert(0, _tokens_before(keys, halo, shards))
    if num_sink_tokens:
        pieces.insert(0, _sinks(keys, starts, halo, num_sink_tokens, shards))
    if empty := offset - num_sink_tokens - halo:
        nothing = jax.tree.map(
            lambda x: jnp.zeros_like(x, shape=(x.shape[0], empty, *x.shape[2:])), keys
        )
        pieces.insert(0, nothing)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)
    lengths = None
    if "lengths" in known:
        lengths = offset + shards.own_lengths(known["lengths"])
    return kernel(
        q,
        joined["k"],
        joined["v"],
        q_offset=offset,
        lengths=lengths,
        segment_ids=joined["segment_ids"],
    )


def _segment_starts(segment_ids: Int[Array, "b C"], shards: Shards) -> Int[Array, "b C"]:
    """The token at which each token's segment begins, wherever that is."""
    before = shards.send(segment_ids[:, -1:], {i: i + 1 for i in range(shards.count - 1)})
    is_first = jnp.arange(shards.size) + shards.first == 0
    begins = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    own = jnp.arange(shards.size, dtype=jnp.int32) + shards.first
    starts = running_max(jnp.where(begins | is_first, own + 1, 0)) - 1
    last = shards.gather(starts[:, -1:])  # [b, shards]; -1 where none begins
    earlier = jnp.where(jnp.arange(shards.count) < shards.index, last, -1)
    return jnp.maximum(starts, jnp.max(earlier, axis=1, keepdims=True))


def _tokens_before(keys: Any, size: int, shards: Shards) -> Any:
    """The `size` tokens before this shard's, from as many shards as that takes."""
    pieces = []
    for hop in range(-(-size // shards.size), 0, -1):
        taken = min(shards.size, size - (hop - 1) * shards.size)
        ends = jax.tree.map(lambda x, taken=taken: x[:, shards.size - taken :], keys)
        pieces.append(shards.send(ends, {i: i + hop for i in range(shards.count - hop)}))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)


def _sinks(
    keys: dict[str, Array], starts: Int[Array, "b C"], halo: int, count: int, shards: Shards
) -> dict[str, Array]:
    """The first tokens of the segment that crosses this shard's border, those before the halo.

    They stand at the end of `count` slots. Every shard gives every other one what it has of them.
    """
    begin_Pb = shards.gather(starts[:, :1]).T
    far_Pb = (jnp.arange(shards.count) * shards.size - halo)[:, None] - begin_Pb
    empty_Pb1 = count - jnp.clip(far_Pb, 0, count)[:, :, None]
    slots = jnp.arange(count)
    at_Pbk = begin_Pb[:, :, None] + slots - empty_Pb1 - shards.first
    is_here = (slots >= empty_Pb1) & (at_Pbk >= 0) & (at_Pbk < shards.size)
    at_Pbk = jnp.clip(at_Pbk, 0, shards.size - 1)

    def exchanged(x: Shaped[Array, "b C ..."]) -> Shaped[Array, "b k ..."]:
        taken = jax.vmap(jax.vmap(lambda row, at: row[at]), in_axes=(None, 0))(x, at_Pbk)
        here = is_here.reshape(*is_here.shape, *(1,) * (x.ndim - 2))
        return jax.lax.psum_scatter(jnp.where(here, taken, 0), shards.names, scatter_dimension=0)

    return {name: exchanged(x) for name, x in keys.items()}


# A layer in which some rows see everything


def heads_at_once(shape: tuple[int, ...], itemsize: int, num_shards: int) -> int:
    """How many KV heads of all shards a device holds at once.

    As many as divide their number and fit half a gibibyte, keys and values together; 0: not one.

    Args:
        shape: of a device's own keys, `[b, C, K, H]`.
        itemsize: bytes of a number of keys and values.
        num_shards: shards of a row.

    Examples:
        >>> heads_at_once((1, 16_384, 8, 128), 2, 8)  # 131,072 tokens
        8
        >>> heads_at_once((1, 131_072, 8, 128), 2, 8)  # 1,048,576 tokens
        1
        >>> heads_at_once((1, 131_072, 8, 128), 2, 16)  # twice as many
        0
    """
    rows, tokens, num_heads, head_dim = shape
    each = 2 * rows * tokens * num_shards * head_dim * itemsize
    fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return max((n for n in fitting if n * each <= _GATHERED_BYTES), default=0)


def _by_heads(attending: Kernel, q: Array, k: Array, v: Array, *, at_once: int) -> Array:
    """`attending` for some KV heads, with their groups, after the others.

    The backward pass gathers keys and values again, rather than to keep those of all layers.
    """
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    run = jax.checkpoint(attending, policy=policy, prevent_cse=False)
    turns = k.shape[2] // at_once
    if turns == 1:
        return run(q, k, v)

    def cut(x: Float[Array, "b C heads H"]) -> Float[Array, "turns b C _ H"]:
        return jnp.moveaxis(x.reshape(*x.shape[:2], turns, -1, x.shape[3]), 2, 0)

    outs = jax.lax.map(lambda qkv: run(*qkv), (cut(q), cut(k), cut(v)))
    return jnp.moveaxis(outs, 0, 2).reshape(q.shape)


def attend_slot_shards(
    kernel: Kernel, q: Array, k: Array, v: Array, *, shards: Shards, units: int
) -> Float[Array, "b n N H"]:
    """Attention of new tokens to cached keys, of which each device has a share.

    Args:
        kernel: of queries and all keys and values.
        q: this device's queries.
        k, v: this device's slots, those of each unit side by side.
        shards: how the slots of a unit are split.
        units: a row's pages; 1: a full cache.
    """

    def attending(q: Array, k: Array, v: Array) -> Array:
        def whole(x: Array) -> Array:
            parts = x.reshape(x.shape[0], units, -1, *x.shape[2:])
            gathered = shards.gather(parts, axis=2)
            return gathered.reshape(x.shape[0], -1, *x.shape[2:])

        return kernel(q, whole(k), whole(v))

    at_once = heads_at_once(k.shape, k.dtype.itemsize, shards.count)
    return _by_heads(attending, q, k, v, at_once=max(at_once, 1))


def _attend_gathered(
    kernel: Kernel, q: Array, k: Array, v: Array, *, shards: Shards, evenly: bool
) -> Float[Array, "b C N H"]:
    """The queries that are this device's turn, to all keys.

    Args:
        kernel: of queries, all keys and values, and `q_offset`.
        q, k, v: this device's.
        shards: how rows are split.
        evenly: each device takes an early and a late half of a shard, which together see as much
            as those of every other one.
    """
    k, v = shards.gather((k, v))
    if not evenly:
        return kernel(q, k, v, q_offset=shards.first)
    half, last = shards.size // 2, 2 * shards.count - 1
    # Half h goes to shard h, those of the later half of the row to shard `last - h`. Even ones are
    # all of them on different shards before and after, and so are odd ones: the two of each shard.
    there = [{h // 2: min(h, last - h) for h in range(first, last + 1, 2)} for first in (0, 1)]
    outs = []
    for first, moves in enumerate(there):
        part = shards.send(q[:, first * half : (first + 1) * half], moves)
        # Shard d has halves d and last - d, one of which is even.
        is_early = shards.index % 2 == first
        number = jnp.where(is_early, shards.index, last - shards.index)
        out = kernel(part, k, v, q_offset=number * half)
        outs.append(shards.send(out, {to: origin for origin, to in moves.items()}))
    return jnp.concatenate(outs, axis=1)
