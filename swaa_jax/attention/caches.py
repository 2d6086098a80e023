"""Key/value caches: a full cache for layers that see everything, a ring for windowed layers.

Keys are stored after RoPE. All rows of a batch share one layout and differ only in `pos_B`, the
number of tokens that each row has seen; padding never enters a cache as a visible token.

    full cache, S slots          slot = position
        [ 0 1 2 3 4 5 6 . . . ]          '.' not written yet

    ring cache, k = 2 sinks, W = 4, after 11 tokens (positions 0..10)
        [ 0 1 | 10 7 8 9 ]               sinks stay; slot of p >= k is k + (p - k) % W

A layer with full heads keeps a full cache of those and another cache, mostly a ring, of the rest.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from swaa_jax.attention.heads import split_heads, take_heads
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import constrain_heads

EMPTY = -1
"""Position of a slot that holds no token; such a slot is never visible."""

_MAX_SINGLE_WRITES = 16
"""New tokens of all rows up to which they may be written one by one, each an operation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCache:
    """Every key and value of the row, at the slot of its position.

    Costs memory in proportion to the whole text. Decoding overwrites right padding, since a slot
    is a position. Writing past the last slot is dropped, so size it for prompt plus answer.

    Attributes:
        k, v: `[B, S, K, H]`.
    """

    # Leaves of a pytree may be anything (shapes, shardings, None), hence no array types here.
    k: Any
    v: Any

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def positions(self, pos_B: Int[Array, " B"]) -> Int[Array, "B S"]:
        """Absolute position of each slot, `EMPTY` where nothing has been written."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)[None, :]
        return jnp.where(slots < pos_B[:, None], slots, EMPTY)

    def write(
        self, k: Float[Array, "B n K H"], v: Float[Array, "B n K H"], pos_B: Int[Array, " B"]
    ) -> "FullCache":
        """Store n new tokens a row, the first at position `pos_B`."""
        slots = pos_B[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
        return FullCache(k=_put(self.k, k, slots), v=_put(self.v, v, slots))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCache:
    """The first `num_sink_tokens` keys and the last ones, in a fixed number of slots.

    Memory is that of window + sinks, whatever the length of the text. What left the window is
    gone: a row that must see everything (a full layer, full-attention decoding) cannot use it.

    Attributes:
        k, v: `[B, R, K, H]`, R = window + sinks.
        slot_positions: `[B, R]`, the absolute position that each slot holds, or `EMPTY`.
        num_sink_tokens: the first slots, which are never overwritten.
    """

    k: Any
    v: Any
    slot_positions: Any
    num_sink_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.k.shape[1]

    def positions(self, pos_B: Int[Array, " B"]) -> Int[Array, "B R"]:
        """Absolute position of each slot, `EMPTY` where nothing has been written."""
        del pos_B  # the ring knows its own positions
        return self.slot_positions

    def write(
        self, k: Float[Array, "B n K H"], v: Float[Array, "B n K H"], pos_B: Int[Array, " B"]
    ) -> "RingCache":
        """Store n new tokens a row, the first at position `pos_B`; the oldest make room.

        When more tokens come than the ring holds, only the last of them (and the sinks) are kept.
        """
        num_new = k.shape[1]
        num_moving = self.num_slots - self.num_sink_tokens
        positions = pos_B[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
        is_sink = positions < self.num_sink_tokens
        survives = is_sink | (positions >= pos_B[:, None] + num_new - num_moving)
        slots = jnp.where(
            survives, ring_slot(positions, self), self.num_slots
        )  # out of range: drop
        rows = jnp.arange(k.shape[0])[:, None]
        return dataclasses.replace(
            self,
            k=_put(self.k, k, slots),
            v=_put(self.v, v, slots),
            slot_positions=self.slot_positions.at[rows, slots].set(positions, mode="drop"),
        )


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


def ring_slot(positions: Int[Array, "*shape"], ring: RingCache) -> Int[Array, "*shape"]:
    """The ring's slot for each absolute position: sinks in place, the rest in turn."""
    sinks = ring.num_sink_tokens
    num_moving = ring.num_slots - sinks
    return jnp.where(positions < sinks, positions, sinks + (positions - sinks) % num_moving)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCache:
    """The caches of a layer with full heads: memory that grows with the text for those alone.

    Attributes:
        full: a `FullCache` of the full heads.
        windowed: a `RingCache` of the other heads; a `FullCache` where they decode in full.
        full_heads: which KV heads are full.
    """

    full: Any
    windowed: Any
    full_heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """Tokens that a row has room for."""
        return self.full.num_slots

    def write(
        self, k: Float[Array, "B n K H"], v: Float[Array, "B n K H"], pos_B: Int[Array, " B"]
    ) -> "SplitCache":
        """Store n new tokens a row, the first at position `pos_B`, each head in its own cache."""
        num_kv_heads = k.shape[2]
        rest = tuple(head for head in range(num_kv_heads) if head not in self.full_heads)

        def written(cache: Any, heads: tuple[int, ...]) -> Any:
            taken = (take_heads(x, heads, num_kv_heads=num_kv_heads) for x in (k, v))
            return cache.write(*taken, pos_B)

        return dataclasses.replace(
            self, full=written(self.full, self.full_heads), windowed=written(self.windowed, rest)
        )


LayerCache: TypeAlias = FullCache | RingCache | SplitCache
"""What a layer keeps."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches:
    """One cache a layer, and `pos_B` `[B]`: how many tokens each row has seen. A pytree."""

    layers: tuple[Any, ...]
    pos_B: Any

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
    num_slots: int,
    mesh: Mesh | None = None,
) -> LayerCache:
    """A layer's cache from its prompt's keys and values.

    Args:
        k, v: right-padded rows, RoPE applied.
        lengths: real tokens of each row.
        layer: the layer's policy; it decides between full cache, ring, and one of each.
        num_slots: slots of a full cache, at least T. A ring has window + sinks slots.
        mesh: rows and heads are split over it as in `attend`.

    Raises:
        ValueError: `num_slots` is smaller than the prompt.
    """
    width, num_kv_heads = k.shape[1:3]
    if num_slots < width:
        raise ValueError(
            f"cache_size: expected at least the prompt's padded length {width}, got {num_slots}"
        )
    parts = split_heads(layer, num_kv_heads)
    if len(parts) > 1:
        full, windowed = (
            build_cache(
                take_heads(k, part.heads, num_kv_heads=num_kv_heads),
                take_heads(v, part.heads, num_kv_heads=num_kv_heads),
                lengths=lengths,
                layer=part.layer,
                num_slots=num_slots,
                mesh=mesh,
            )
            for part in parts
        )
        return SplitCache(full=full, windowed=windowed, full_heads=layer.full_heads)
    if parts[0].layer.needs_full_cache:
        pad = ((0, 0), (0, num_slots - width), (0, 0), (0, 0))
        cache = FullCache(k=jnp.pad(k, pad), v=jnp.pad(v, pad))
    else:
        cache = _ring_from_rows(k, v, lengths=lengths, layer=layer)
    return dataclasses.replace(
        cache, k=constrain_heads(cache.k, mesh), v=constrain_heads(cache.v, mesh)
    )


def recast_caches(caches: Caches, layers: tuple[LayerAttention, ...]) -> Caches:
    """The same tokens in the caches that another policy asks for.

    Lets policies that differ only in `decode` share one prefill: run it with full caches, then
    turn those of windowed layers into rings.

    Raises:
        ValueError: a ring cannot become a full cache (its older keys are gone), or the number of
            layers or a layer's full heads differ.
    """
    if len(layers) != len(caches.layers):
        raise ValueError(f"layers: expected {len(caches.layers)} of them, got {len(layers)}")
    recast = tuple(
        _recast(cache, layer, pos_B=caches.pos_B, index=index)
        for index, (cache, layer) in enumerate(zip(caches.layers, layers, strict=True))
    )
    return Caches(layers=recast, pos_B=caches.pos_B)


def _recast(
    cache: LayerCache, layer: LayerAttention, *, pos_B: Int[Array, " B"], index: int
) -> LayerCache:
    held = cache.full_heads if isinstance(cache, SplitCache) else ()
    if held != layer.full_heads:
        raise ValueError(
            f"layer {index}: expected a cache with full heads {layer.full_heads}, got one with "
            f"{held}; prefill again under this policy"
        )
    if isinstance(cache, SplitCache):
        rest = dataclasses.replace(layer, full_heads=())
        windowed = _recast(cache.windowed, rest, pos_B=pos_B, index=index)
        return dataclasses.replace(cache, windowed=windowed)
    if isinstance(cache, FullCache) and not layer.needs_full_cache:
        return _ring_from_rows(cache.k, cache.v, lengths=pos_B, layer=layer)
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
) -> RingCache:
    """Gather into each slot the newest position that belongs there."""
    assert layer.window is not None, "a full layer has no ring"
    sinks, num_moving = layer.num_sink_tokens, layer.window
    slots = jnp.arange(sinks + num_moving, dtype=jnp.int32)[None, :]
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
