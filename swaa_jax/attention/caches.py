"""Key/value caches: a full cache for layers that see everything, a ring for windowed layers.

Keys are stored after RoPE, but for `StreamCache`. All rows of a batch share one layout and differ
only in `pos_B`, the number of tokens that each row has seen; padding never enters a cache as a
visible token.

    full cache, S slots          slot = position
        [ 0 1 2 3 4 5 6 . . . ]          '.' not written yet

    ring cache, k = 2 sinks, W = 4, after 11 tokens (positions 0..10)
        [ 0 1 | 10 7 8 9 ]               sinks stay; slot of p >= k is k + (p - k) % W

A layer with full heads keeps a full cache of those and another cache, mostly a ring, of the rest.
Where rows come and go one by one, full caches are pages of a pool, so that a row takes room for
what it holds::

    pool    page    0   1   2   3   4   5   6        pages of 4 slots
            row     .   A   A   B   .   A   B
    table   row A   [ 5 1 2 . ]                      positions 0-3 in page 5, 4-7 in 1, 8-11 in 2
            row B   [ 3 6 . . ]
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from swaa_jax.attention.heads import take_heads
from swaa_jax.attention.shards import Shards

EMPTY = -1
"""Position of a slot that holds no token; such a slot is never visible.

>>> cache = FullCache(k=jnp.zeros((1, 3, 2, 16)), v=jnp.zeros((1, 3, 2, 16)))
>>> (cache.positions(jnp.array([2])) == EMPTY).tolist()
[[False, False, True]]
"""

DEFAULT_ROOM = 128
"""Slots of a full cache behind the prompt where no size is given."""

_MAX_SINGLE_WRITES = 16
"""New tokens of all rows up to which they may be written one by one, each an operation."""

AnyCache = TypeVar("AnyCache", bound="Cache")


class Cache(abc.ABC):
    """What one layer keeps of its rows' tokens: what all caches can do.

    A pytree whose leaves start with the batch, or with the pages of a pool. Nothing is changed in
    place: under jit, donate what is replaced.

    >>> cache = FullCache(k=jnp.zeros((3, 8, 2, 16)), v=jnp.zeros((3, 8, 2, 16)))
    >>> isinstance(cache, Cache), cache.num_slots, cache.take(2).k.shape  # one row
    (True, 8, (1, 8, 2, 16))
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

    def bound(self: AnyCache, table: Int[Array, "B M"] | None) -> AnyCache:
        """The cache with the pages of its rows, where it is made of pages; None takes them away."""
        del table
        return self

    def parts(self) -> "list[Cache]":
        """The caches that it is made of: of all heads, or of some."""
        return [self]

    def take(self: AnyCache, at: Int[Array, ""] | int) -> AnyCache:
        """Row `at`, which may be traced, as a cache of one row."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, 1), self)

    def insert(self: AnyCache, row: "Cache", at: Int[Array, ""] | int) -> AnyCache:
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

    Examples:
        >>> cache = FullCache(k=jnp.zeros((1, 4, 2, 16)), v=jnp.zeros((1, 4, 2, 16)))
        >>> cache.positions(jnp.array([3])).tolist()  # after three tokens
        [[0, 1, 2, -1]]
    """

    # Leaves of a pytree may be anything (shapes, shardings, None), hence no array types here.
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def positions(
        self, pos_B: Int[Array, " B"], *, shards: Shards | None = None
    ) -> Int[Array, "B S"]:
        """A slot is a position. `shards`: these are a device's slots alone."""
        return _slots_as_positions(self.num_slots, pos_B, shards)

    def write(
        self,
        k: Float[Array, "B n K H"],
        v: Float[Array, "B n K H"],
        pos_B: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
        *,
        shards: Shards | None = None,
    ) -> "FullCache":
        """Tokens past the last slot are dropped.

        `shards`: these are a device's slots alone; tokens of others are dropped, too.
        """
        positions, end_B1 = _new_positions(k.shape[1], pos_B, lengths)
        slots = positions if shards is None else positions - shards.first
        # Out of range: drop.
        slots = jnp.where((positions < end_B1) & (slots >= 0), slots, self.num_slots)
        return FullCache(k=_put(self.k, k, slots), v=_put(self.v, v, slots))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache(Cache):
    """Every key and value of the rows, in pages of a pool that they share.

    Who gets which page is decided on the host. All layers of a model have one table, which its
    `Caches` hold: a layer has it while it runs.

    Attributes:
        k, v: the pool, `[P, page, K, H]`.
        table: each row's pages in turn, int32 `[B, M]`. Entries behind its last page are not read.

    Examples:
        >>> pool = jnp.zeros((6, 16, 2, 8))  # 6 pages of 16 slots
        >>> cache = PagedCache(k=pool, v=pool, table=jnp.array([[4, 0], [2, 5]]))
        >>> cache.num_slots, cache.rows().k.shape  # of two rows with two pages each
        (32, (2, 32, 2, 8))
    """

    k: Float[Array, "P page K H"]
    v: Float[Array, "P page K H"]
    table: Int[Array, "B M"] | None = None

    @property
    def pages(self) -> Int[Array, "B M"]:
        """The table.

        Raises:
            ValueError: it is not there.
        """
        if self.table is None:
            raise ValueError("cache: expected pages with their table, got none; see Caches.bound")
        return self.table

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for with as many pages as the table has columns."""
        return self.k.shape[1] * self.pages.shape[1]

    def positions(
        self, pos_B: Int[Array, " B"], *, shards: Shards | None = None
    ) -> Int[Array, "B S"]:
        """Page after page, a row's slots are its positions.

        `shards`: these are a device's slots of each page.
        """
        return _slots_as_positions(self.num_slots, pos_B, shards)

    def write(
        self,
        k: Float[Array, "B n K H"],
        v: Float[Array, "B n K H"],
        pos_B: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
        *,
        shards: Shards | None = None,
    ) -> "PagedCache":
        """Tokens past a row's last slot are dropped.

        `shards`: these are a device's slots of each page; tokens of others are dropped, too.
        """
        num_pages, num_here = self.k.shape[:2]
        page_slots = num_here if shards is None else num_here * shards.count
        positions, end_B1 = _new_positions(k.shape[1], pos_B, lengths)
        column, last = positions // page_slots, self.pages.shape[1] - 1
        slot = positions % page_slots - (0 if shards is None else shards.first)
        is_here = (slot >= 0) & (slot < num_here)
        page = jnp.take_along_axis(self.pages, jnp.minimum(column, last), axis=1)
        is_held = is_here & (positions < end_B1) & (column <= last)
        at = (jnp.where(is_held, page, num_pages), jnp.where(is_here, slot, 0))  # P: drop
        return dataclasses.replace(
            self,
            k=self.k.at[at].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[at].set(v.astype(self.v.dtype), mode="drop"),
        )

    def bound(self, table: Int[Array, "B M"] | None) -> "PagedCache":
        """The pool with this table."""
        return dataclasses.replace(self, table=table)

    def take(self, at: Int[Array, ""] | int) -> "PagedCache":
        """The pool, with one row of the table if it is there."""
        row = None if self.table is None else lax.dynamic_slice_in_dim(self.table, at, 1)
        return self.bound(row)

    def insert(self, row: Cache, at: Int[Array, ""] | int) -> "PagedCache":
        """The pool as the row has left it, with this cache's table."""
        del at
        assert isinstance(row, PagedCache)
        return row.bound(self.table)

    def rows(self) -> FullCache:
        """Each row's own slots, copied out of the pool."""
        shape = (self.pages.shape[0], self.num_slots, *self.k.shape[2:])
        return FullCache(k=self.k[self.pages].reshape(shape), v=self.v[self.pages].reshape(shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCache(Cache):
    """The first `num_sink_tokens` keys and the last ones, in a fixed number of slots.

    The cache of a windowed layer that keeps the first k (arXiv 2512.10411, section 3.2).
    Memory is that of window + sinks, whatever the length of the text, and less where a row is
    known to stay shorter. What left the window is gone: a row that must see everything (a full
    layer, full-attention decoding) cannot use it.

    Attributes:
        k, v: `[B, R, K, H]`, R = window + sinks, or as many as a row can be long.
        slot_positions: `[B, R]`, the absolute position that each slot holds, or `EMPTY`.
        num_sink_tokens: the first slots, which are never overwritten.

    Examples:
        >>> k = jnp.zeros((1, 4, 2, 16))  # a window of 3, and a sink
        >>> ring = RingCache(k=k, v=k, slot_positions=jnp.full((1, 4), EMPTY), num_sink_tokens=1)
        >>> new = jnp.ones((1, 6, 2, 16))
        >>> ring.write(new, new, jnp.array([0])).slot_positions.tolist()  # 1 and 2 are overwritten
        [[0, 4, 5, 3]]
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
        """The ring knows its own positions; what a row before left behind stands past `pos_B`."""
        return jnp.where(self.slot_positions < pos_B[:, None], self.slot_positions, EMPTY)

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
    """A ring whose keys are stored before RoPE, for positions inside the cache (`attend_stream`;
    StreamingLLM, arXiv 2309.17453).

    They are rotated anew for each token, which costs a copy of the ring's keys: the price of
    answers without end.

    >>> from swaa_jax.attention import as_stream, empty_cache
    >>> from swaa_jax.policy import LayerAttention
    >>> layer = LayerAttention(window=64, num_sink_tokens=4)
    >>> ring = empty_cache(layer, shape=(1, 2, 16), cache_size=1024, dtype="float32")
    >>> isinstance(as_stream(ring), StreamCache)
    True
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCache(Cache):
    """The caches of a layer with full heads: memory that grows with the text for those alone.

    Attributes:
        full: a `FullCache` of the full heads, whose slots and positions are the split cache's.
        windowed: a `RingCache` of the other heads; a `FullCache` where they decode in full.
        full_heads: which KV heads are full.

    Examples:
        >>> from swaa_jax.attention import empty_cache
        >>> from swaa_jax.policy import LayerAttention
        >>> layer = LayerAttention(window=64, num_sink_tokens=4, full_heads=(1,))
        >>> cache = empty_cache(layer, shape=(1, 2, 16), cache_size=1024, dtype="float32")
        >>> cache.full.num_slots, cache.windowed.num_slots
        (1024, 68)
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

    def parts(self) -> list[Cache]:
        """That of the full heads, and that of the others."""
        return [self.full, self.windowed]

    def bound(self, table: Int[Array, "B M"] | None) -> "SplitCache":
        """Both caches with their pages."""
        return dataclasses.replace(
            self, full=self.full.bound(table), windowed=self.windowed.bound(table)
        )

    def take(self, at: Int[Array, ""] | int) -> "SplitCache":
        """Row `at` of both caches."""
        return dataclasses.replace(self, full=self.full.take(at), windowed=self.windowed.take(at))

    def insert(self, row: Cache, at: Int[Array, ""] | int) -> "SplitCache":
        """Both caches with one row of each."""
        assert isinstance(row, SplitCache)
        return dataclasses.replace(
            self,
            full=self.full.insert(row.full, at),
            windowed=self.windowed.insert(row.windowed, at),
        )


LayerCache: TypeAlias = FullCache | PagedCache | RingCache | SplitCache
"""What a layer keeps.

>>> isinstance(FullCache(k=jnp.zeros((1, 4, 2, 16)), v=jnp.zeros((1, 4, 2, 16))), LayerCache)
True
"""


def _slots_as_positions(
    num_slots: int, pos_B: Int[Array, " B"], shards: Shards | None
) -> Int[Array, "B S"]:
    """Where a slot is a position: its number, as far as it is written.

    `shards`: these are a device's slots, of the whole row or of each unit of it, such as a page.
    """
    slots = jnp.arange(num_slots, dtype=jnp.int32)[None, :]
    if shards is not None:
        unit, at = jnp.divmod(slots, shards.size)
        slots = unit * shards.size * shards.count + shards.first + at
    return jnp.where(slots < pos_B[:, None], slots, EMPTY)


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
    """One cache a layer, and `pos_B` `[B]`: how many tokens each row has seen. A pytree.

    `table` `[B, M]` has the rows' pages, where layers are made of pages.

    >>> cache = FullCache(k=jnp.zeros((1, 8, 2, 16)), v=jnp.zeros((1, 8, 2, 16)))
    >>> Caches(layers=(cache, cache), pos_B=jnp.array([0])).nbytes  # 2 layers, k and v, float32
    4096
    """

    layers: tuple[LayerCache, ...]
    pos_B: Int[Array, " B"]
    table: Int[Array, "B M"] | None = None

    def bound(self) -> tuple[LayerCache, ...]:
        """The layers, each with the table of pages."""
        return tuple(layer.bound(self.table) for layer in self.layers)

    def grown(self, layers: Sequence[LayerCache], pos_B: Int[Array, " B"]) -> "Caches":
        """These caches after a run of their layers."""
        layers = tuple(layer.bound(None) for layer in layers)
        return dataclasses.replace(self, layers=layers, pos_B=pos_B)

    def take(self, at: Int[Array, ""] | int) -> "Caches":
        """Row `at`, which may be traced, as caches of one row."""
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=at, slice_size=1)
        return Caches(
            layers=tuple(layer.take(at) for layer in self.layers),
            pos_B=take(self.pos_B),
            table=None if self.table is None else take(self.table),
        )

    def insert(self, row: "Caches", at: Int[Array, ""] | int) -> "Caches":
        """These caches with caches of one row in place of row `at`, which may be traced."""
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
        layers = tuple(
            layer.insert(one, at) for layer, one in zip(self.layers, row.layers, strict=True)
        )
        table = None
        if self.table is not None and row.table is not None:
            table = put(self.table, row.table)
        return Caches(layers=layers, pos_B=put(self.pos_B, row.pos_B), table=table)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values (a ring's slot positions, 4 bytes a slot, included)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))
