"""Key/value caches: a full cache for layers that see everything, a ring for windowed layers.

Keys are stored after RoPE, but for `StreamCache`. All rows of a batch share one layout and differ
only in `pos_B`, the number of tokens that each row has seen; padding never enters a cache as a
visible token.

    full cache, S slots          slot = position
        [ 0 1 2 3 4 5 6 . . . ]          '.' not written yet

    ring cache, k = 2 sinks, W = 4, after 11 tokens (positions 0..10)
        [ 0 1 | 10 7 8 9 ]               sinks stay; slot of p >= k is k + (p - k) % W

A layer with full heads keeps a full cache of those and another cache, mostly a ring, of the rest.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import pad_end
from swaa_jax.attention.heads import split_heads, take_heads
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import constrain_heads

EMPTY = -1
"""Position of a slot that holds no token; such a slot is never visible."""

DEFAULT_ROOM = 128
"""Slots of a full cache behind the prompt where no size is given."""

_MAX_SINGLE_WRITES = 16
"""New tokens of all rows up to which they may be written one by one, each an operation."""

AnyCache = TypeVar("AnyCache", bound="Cache")


class Cache(abc.ABC):
    """What one layer keeps of its rows' tokens: what all caches can do.

    A pytree whose leaves start with the batch. Nothing is changed in place: under jit, donate what
    is replaced.
    """

    @property
    @abc.abstractmethod
    def num_slots(self) -> int:
        """Tokens that a row has room for."""

    @abc.abstractmethod
    def positions(self, pos_B: Int[Array, " B"]) -> Int[Array, "B S"]:
        """Absolute position that each slot holds, `EMPTY` where nothing has been written.

        Args:
            pos_B: tokens that each row has seen.
        """

    @abc.abstractmethod
    def write(
        self: AnyCache,
        k: Float[Array, "B n K H"],
        v: Float[Array, "B n K H"],
        pos_B: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
    ) -> AnyCache:
        """The cache with n new tokens a row, the first at position `pos_B`.

        Args:
            k, v: of the new tokens, RoPE applied.
            pos_B: tokens that each row has seen before these.
            lengths: how many of the n are real, 0 to n; the rest is never written. None: all.
        """

    def take(self: AnyCache, at: Int[Array, ""] | int) -> AnyCache:
        """Row `at`, which may be traced, as a cache of one row."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, 1), self)

    def insert(self: AnyCache, row: AnyCache, at: Int[Array, ""] | int) -> AnyCache:
        """The cache with a cache of one row in place of row `at`, which may be traced.

        Raises:
            ValueError: the row is of another layout: other slots, heads or kinds.
        """
        layouts = (
            jax.tree.map(lambda x: ((1, *x.shape[1:]), x.dtype), self),
            jax.tree.map(lambda x: (x.shape, x.dtype), row),
        )
        if layouts[0] != layouts[1]:
            raise ValueError(
                f"row: expected one row of {self.num_slots} slots, laid out as the cache it is put "
                f"into, got {row.num_slots} slots; build both for one layer and cache_size"
            )
        return jax.tree.map(
            lambda x, one: lax.dynamic_update_slice_in_dim(x, one, at, axis=0), self, row
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCache(Cache):
    """Every key and value of the row, at the slot of its position.

    Costs memory in proportion to the whole text. Decoding overwrites right padding, since a slot
    is a position. Writing past the last slot is dropped, so size it for prompt plus answer.

    Attributes:
        k, v: `[B, S, K, H]`.
    """

    # Leaves of a pytree may be anything (shapes, shardings, None), hence no array types here.
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def positions(self, pos_B: Int[Array, " B"]) -> Int[Array, "B S"]:
        """A slot is a position."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)[None, :]
        return jnp.where(slots < pos_B[:, None], slots, EMPTY)

    def write(
        self,
        k: Float[Array, "B n K H"],
        v: Float[Array, "B n K H"],
        pos_B: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
    ) -> "FullCache":
        """Tokens past the last slot are dropped."""
        positions, end_B1 = _new_positions(k.shape[1], pos_B, lengths)
        slots = jnp.where(positions < end_B1, positions, self.num_slots)  # out of range: drop
        return FullCache(k=_put(self.k, k, slots), v=_put(self.v, v, slots))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCache(Cache):
    """The first `num_sink_tokens` keys and the last ones, in a fixed number of slots.

    Memory is that of window + sinks, whatever the length of the text, and less where a row is
    known to stay shorter. What left the window is gone: a row that must see everything (a full
    layer, full-attention decoding) cannot use it.

    Attributes:
        k, v: `[B, R, K, H]`, R = window + sinks, or as many as a row can be long.
        slot_positions: `[B, R]`, the absolute position that each slot holds, or `EMPTY`.
        num_sink_tokens: the first slots, which are never overwritten.
    """

    k: Float[Array, "B R K H"]
    v: Float[Array, "B R K H"]
    slot_positions: Int[Array, "B R"]
    num_sink_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def positions(self, pos_B: Int[Array, " B"]) -> Int[Array, "B R"]:
        """The ring knows its own positions."""
        del pos_B
        return self.slot_positions

    def write(
        self,
        k: Float[Array, "B n K H"],
        v: Float[Array, "B n K H"],
        pos_B: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
    ) -> "RingCache":
        """The oldest tokens make room; of more than the ring holds the last (and sinks) stay."""
        positions, end_B1 = _new_positions(k.shape[1], pos_B, lengths)
        sinks, num_moving = self.num_sink_tokens, self.num_slots - self.num_sink_tokens
        survives = (positions < sinks) | (positions >= end_B1 - num_moving)
        at = jnp.where(positions < sinks, positions, sinks + (positions - sinks) % num_moving)
        # Out of range: drop.
        slots = jnp.where(survives & (positions < end_B1), at, self.num_slots)
        rows = jnp.arange(k.shape[0])[:, None]
        return dataclasses.replace(
            self,
            k=_put(self.k, k, slots),
            v=_put(self.v, v, slots),
            slot_positions=self.slot_positions.at[rows, slots].set(positions, mode="drop"),
        )


def ring_in_order(
    ring: Float[Array, "B R K H"],
    new: Float[Array, "B n K H"],
    *,
    pos_B: Int[Array, " B"],
    num_sink_tokens: int,
) -> Float[Array, "B S K H"]:
    """A ring's keys or values in order of position, without a gap the new ones, S = R + n.

    Ring of 2 sinks and 4 more that has seen 9 tokens, and 3 new ones::

        slots     0  1 | 6  7  8  5 |            slot of position p >= 2: 2 + (p - 2) % 4
        in order  0  1   5  6  7  8  9 10 11     the new ones from min(9, R) = 6 on

    Args:
        ring: of a `RingCache`, before the new tokens are written.
        new: the tokens from position `pos_B` on.
        pos_B: tokens that each row has seen.
        num_sink_tokens: of the policy; a ring that is shorter never came round.
    """
    num_slots, num_new = ring.shape[1], new.shape[1]
    sinks = min(num_sink_tokens, num_slots - 1)
    num_moving = num_slots - sinks
    index = jnp.arange(num_slots + num_new, dtype=jnp.int32)[None, :]
    seen = jnp.minimum(pos_B, num_slots)[:, None]
    moved = jnp.maximum(pos_B, num_slots)[:, None] - num_slots  # how far the moving part has come
    slots = jnp.where(index < sinks, index, sinks + (index - sinks + moved) % num_moving)
    source = jnp.where(index < seen, slots, num_slots + jnp.clip(index - seen, 0, num_new - 1))
    both = jnp.concatenate([ring, new.astype(ring.dtype)], axis=1)
    return jnp.take_along_axis(both, source[:, :, None, None], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamCache(RingCache):
    """A ring whose keys are stored before RoPE, for positions inside the cache (`attend_stream`).

    They are rotated anew for each token, which costs a copy of the ring's keys: the price of
    answers without end.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCache(Cache):
    """The caches of a layer with full heads: memory that grows with the text for those alone.

    Attributes:
        full: a `FullCache` of the full heads, whose slots and positions are the split cache's.
        windowed: a `RingCache` of the other heads; a `FullCache` where they decode in full.
        full_heads: which KV heads are full.
    """

    full: "LayerCache"
    windowed: "LayerCache"
    full_heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.full.num_slots

    def positions(self, pos_B: Int[Array, " B"]) -> Int[Array, "B S"]:
        """Those of the full heads' cache, which holds every token."""
        return self.full.positions(pos_B)

    def write(
        self,
        k: Float[Array, "B n K H"],
        v: Float[Array, "B n K H"],
        pos_B: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
    ) -> "SplitCache":
        """Each head goes into its own cache."""
        num_kv_heads = k.shape[2]
        rest = tuple(head for head in range(num_kv_heads) if head not in self.full_heads)

        def written(cache: Cache, heads: tuple[int, ...]) -> Cache:
            take = functools.partial(take_heads, heads=heads, num_kv_heads=num_kv_heads)
            return cache.write(take(k), take(v), pos_B, lengths)

        return dataclasses.replace(
            self, full=written(self.full, self.full_heads), windowed=written(self.windowed, rest)
        )


LayerCache: TypeAlias = FullCache | RingCache | SplitCache
"""What a layer keeps."""


def _new_positions(
    num_new: int, pos_B: Int[Array, " B"], lengths: Int[Array, " B"] | None
) -> tuple[Int[Array, "B n"], Int[Array, "B 1"]]:
    """Positions of new tokens, and the first position that none of them is to be written at."""
    positions = pos_B[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
    return positions, (pos_B + (num_new if lengths is None else lengths))[:, None]


def _put(
    cache: Float[Array, "B S K H"], new: Float[Array, "B n K H"], slots: Int[Array, "B n"]
) -> Float[Array, "B S K H"]:
    """The cache with each new token at its slot; those past the last slot are dropped.

    On TPUs a cache with H < 128 has its slots along lanes, where XLA's scatter works on a copy of
    the whole cache. Updates of one token are in place, so a few tokens are written one by one.
    """
    new = new.astype(cache.dtype)
    num_batch, num_new = slots.shape
    if cache.shape[3] % 128 == 0 or num_batch * num_new > _MAX_SINGLE_WRITES:
        return cache.at[jnp.arange(num_batch)[:, None], slots].set(new, mode="drop")
    last = cache.shape[1] - 1
    for row in range(num_batch):
        for token in range(num_new):
            slot = slots[row, token]
            at = (row, jnp.minimum(slot, last), 0, 0)
            one = new[row : row + 1, token : token + 1]
            held = jax.lax.dynamic_slice(cache, at, one.shape)
            one = jnp.where(slot <= last, one, held)
            cache = jax.lax.dynamic_update_slice(cache, one, at)
    return cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches:
    """One cache a layer, and `pos_B` `[B]`: how many tokens each row has seen. A pytree."""

    layers: tuple[LayerCache, ...]
    pos_B: Int[Array, " B"]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (a ring's slot positions, 4 bytes a slot, included)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))


def build_cache(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    lengths: Int[Array, " B"],
    layer: LayerAttention,
    cache_size: int | None = None,
    mesh: Mesh | None = None,
) -> LayerCache:
    """A layer's cache from its prompt's keys and values.

    Args:
        k, v: right-padded rows, RoPE applied.
        lengths: real tokens of each row.
        layer: the layer's policy; it decides between full cache, ring, and one of each.
        cache_size: tokens that a row can become long, at least T: the slots of a full cache, and
            the most that a ring gets. None: a full cache has T + 128, a ring window + sinks.
        mesh: rows and heads are split over it as in `attend`.

    Raises:
        ValueError: `cache_size` is smaller than the prompt.
    """
    width, num_kv_heads = k.shape[1:3]
    if cache_size is not None and cache_size < width:
        raise ValueError(
            f"cache_size: expected at least the prompt's padded length {width}, got {cache_size}"
        )
    parts = split_heads(layer, num_kv_heads)
    if len(parts) > 1:
        full, windowed = (
            build_cache(
                take_heads(k, part.heads, num_kv_heads=num_kv_heads),
                take_heads(v, part.heads, num_kv_heads=num_kv_heads),
                lengths=lengths,
                layer=part.layer,
                cache_size=cache_size,
                mesh=mesh,
            )
            for part in parts
        )
        return SplitCache(full=full, windowed=windowed, full_heads=layer.full_heads)
    if parts[0].layer.needs_full_cache:
        missing = DEFAULT_ROOM if cache_size is None else cache_size - width
        cache = FullCache(k=pad_end(k, missing, axis=1), v=pad_end(v, missing, axis=1))
    else:
        cache = _ring_from_rows(k, v, lengths=lengths, layer=layer, cache_size=cache_size)
    return dataclasses.replace(
        cache, k=constrain_heads(cache.k, mesh), v=constrain_heads(cache.v, mesh)
    )


def empty_cache(
    layer: LayerAttention,
    *,
    shape: tuple[int, int, int],
    cache_size: int,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> LayerCache:
    """A layer's cache before its rows' first token, for prompts that are read in chunks.

    A windowed layer whose prompts have a tail keeps all keys until the prompt is read;
    `recast_caches` turns its cache into a ring then.

    Args:
        layer: the layer's policy.
        shape: rows, KV heads and head dim.
        cache_size: tokens that a row can become long, as in `build_cache`.
        dtype: of keys and values.
        mesh: rows and heads are split over it as in `attend`.
    """
    num_rows, num_kv_heads, head_dim = shape
    padding = jnp.zeros((num_rows, 1, num_kv_heads, head_dim), dtype)
    while_read = dataclasses.replace(
        layer, full_decode=layer.full_decode or layer.full_attention_tail > 0
    )
    lengths = jnp.zeros((num_rows,), jnp.int32)
    return build_cache(
        padding, padding, lengths=lengths, layer=while_read, cache_size=cache_size, mesh=mesh
    )


def check_stream(layers: Sequence[LayerAttention], *, context: int | None = None) -> None:
    """Refuses layers that positions inside the cache are not for.

    Args:
        layers: of the policy.
        context: positions that the model was trained on, which window and sinks must not exceed.

    Raises:
        ValueError: a layer that needs a full cache, or too wide a window.
    """
    for index, layer in enumerate(layers):
        if layer.needs_full_cache or layer.full_heads or layer.window is None:
            raise ValueError(
                "positions: expected a policy whose every layer and head is windowed, answers too, "
                f'for "cache", got layer {index} with {layer}; use "text", or another policy'
            )
        width = layer.window + layer.num_sink_tokens
        if context is not None and width > context:
            raise ValueError(
                f"positions: expected window and sinks of at most the model's context of {context} "
                f'tokens for "cache", got {width} in layer {index}; make the window smaller'
            )


def as_stream(ring: LayerCache) -> StreamCache:
    """A ring of keys before RoPE as what it is."""
    assert isinstance(ring, RingCache)
    fields = {field.name: getattr(ring, field.name) for field in dataclasses.fields(ring)}
    return StreamCache(**fields)


def recast_caches(
    caches: Caches, layers: tuple[LayerAttention, ...], *, cache_size: int | None = None
) -> Caches:
    """The same tokens in the caches that another policy asks for.

    Lets policies that differ only in `decode` share one prefill: run it with full caches, then
    turn those of windowed layers into rings.

    Args:
        caches: of a prefill.
        layers: the other policy, layer by layer.
        cache_size: the most slots that a ring gets, as in `build_cache`.

    Raises:
        ValueError: a ring cannot become a full cache (its older keys are gone), or the number of
            layers or a layer's full heads differ.
    """
    if len(layers) != len(caches.layers):
        raise ValueError(f"layers: expected {len(caches.layers)} of them, got {len(layers)}")
    recast = tuple(
        _recast(cache, layer, pos_B=caches.pos_B, cache_size=cache_size, index=index)
        for index, (cache, layer) in enumerate(zip(caches.layers, layers, strict=True))
    )
    return Caches(layers=recast, pos_B=caches.pos_B)


def _recast(
    cache: LayerCache,
    layer: LayerAttention,
    *,
    pos_B: Int[Array, " B"],
    cache_size: int | None,
    index: int,
) -> LayerCache:
    held = cache.full_heads if isinstance(cache, SplitCache) else ()
    if held != layer.full_heads:
        raise ValueError(
            f"layer {index}: expected a cache with full heads {layer.full_heads}, got one with "
            f"{held}; prefill again under this policy"
        )
    if isinstance(cache, SplitCache):
        rest = dataclasses.replace(layer, full_heads=())
        windowed = _recast(cache.windowed, rest, pos_B=pos_B, cache_size=cache_size, index=index)
        return dataclasses.replace(cache, windowed=windowed)
    if isinstance(cache, FullCache) and not layer.needs_full_cache:
        return _ring_from_rows(cache.k, cache.v, lengths=pos_B, layer=layer, cache_size=cache_size)
    if isinstance(cache, RingCache) and layer.needs_full_cache:
        raise ValueError(
            f"layer {index}: a ring cache cannot serve a layer that needs a full cache; "
            "prefill with the policy that keeps more, then recast to the one that keeps less"
        )
    return cache


def _ring_from_rows(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    lengths: Int[Array, " B"],
    layer: LayerAttention,
    cache_size: int | None,
) -> RingCache:
    """Gather into each slot the newest position that belongs there.

    A capped ring never comes round, so that its slots are positions; one of them has to move all
    the same, for the arithmetic.
    """
    assert layer.window is not None, "a full layer has no ring"
    num_slots = layer.window + layer.num_sink_tokens
    if cache_size is not None:
        num_slots = min(num_slots, cache_size)
    sinks = min(layer.num_sink_tokens, num_slots - 1)
    num_moving = num_slots - sinks
    slots = jnp.arange(num_slots, dtype=jnp.int32)[None, :]
    newest = lengths.astype(jnp.int32)[:, None] - 1
    # The largest p <= newest with p >= sinks and (p - sinks) % num_moving == slot - sinks.
    moving = newest - (newest - slots) % num_moving
    positions = jnp.where(slots < sinks, slots, moving)
    held = (positions <= newest) & ((slots < sinks) | (positions >= sinks))
    source = jnp.clip(positions, 0, k.shape[1] - 1)[:, :, None, None]
    return RingCache(
        k=jnp.where(held[:, :, None, None], jnp.take_along_axis(k, source, axis=1), 0),
        v=jnp.where(held[:, :, None, None], jnp.take_along_axis(v, source, axis=1), 0),
        slot_positions=jnp.where(held, positions, EMPTY),
        num_sink_tokens=sinks,
    )
