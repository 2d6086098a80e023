"""Caches made: from a prompt's keys and values, empty, or out of those of another policy."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import pad_end
from swaa_jax.attention.caches import (
    DEFAULT_ROOM,
    EMPTY,
    Caches,
    FullCache,
    LayerCache,
    PagedCache,
    RingCache,
    SplitCache,
    StreamCache,
)
from swaa_jax.attention.heads import split_heads, take_heads
from swaa_jax.attention.placing import constrain_cache
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import lacking_tokens


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
        mesh: rows, heads and a full cache's slots are split over it; slots are added until its
            `context` divides them.

    Raises:
        ValueError: `cache_size` is smaller than the prompt.

    Examples:
        >>> k = v = jnp.ones((1, 100, 2, 16))
        >>> layers = LayerAttention(), LayerAttention(window=64, num_sink_tokens=4)
        >>> [build_cache(k, v, lengths=jnp.array([100]), layer=layer).num_slots for layer in layers]
        [228, 68]
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
        num_slots = width + DEFAULT_ROOM if cache_size is None else cache_size
        missing = num_slots + lacking_tokens(mesh, num_slots) - width
        cache = FullCache(k=pad_end(k, missing, axis=1), v=pad_end(v, missing, axis=1))
    else:
        cache = _ring_from_rows(k, v, lengths=lengths, layer=layer, cache_size=cache_size)
    return constrain_cache(cache, mesh)


def empty_cache(
    layer: LayerAttention,
    *,
    shape: tuple[int, int, int],
    cache_size: int,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    pages: tuple[int, int] | None = None,
) -> LayerCache:
    """A layer's cache before its rows' first token, for prompts that are read in chunks.

    A windowed layer whose prompts have a tail keeps all keys until the prompt is read;
    `recast_caches` turns its cache into a ring then. Pages stay pages.

    Args:
        layer: the layer's policy.
        shape: rows, KV heads and head dim.
        cache_size: tokens that a row can become long, as in `build_cache`.
        dtype: of keys and values.
        mesh: rows, heads and a full cache's slots are split over it.
        pages: how many there are, and the slots of each, for full caches of pages.

    Examples:
        >>> layer = LayerAttention(window=64, num_sink_tokens=4)
        >>> cache = empty_cache(layer, shape=(3, 2, 16), cache_size=1024, dtype="bfloat16")
        >>> cache.k.shape  # 3 rows, window + sinks, 2 KV heads of 16
        (3, 68, 2, 16)
    """
    num_rows, num_kv_heads, head_dim = shape
    padding = jnp.zeros((num_rows, 1, num_kv_heads, head_dim), dtype)
    while_read = dataclasses.replace(
        layer, full_decode=layer.full_decode or layer.full_attention_tail > 0
    )
    if pages is not None:
        parts = [
            _pool((*pages, len(part.heads), head_dim), dtype=dtype, mesh=mesh)
            if part.layer.needs_full_cache
            else empty_cache(
                part.layer,
                shape=(num_rows, len(part.heads), head_dim),
                cache_size=cache_size,
                dtype=dtype,
                mesh=mesh,
            )
            for part in split_heads(while_read, num_kv_heads)
        ]
        if len(parts) == 1:
            return parts[0]
        return SplitCache(full=parts[0], windowed=parts[1], full_heads=layer.full_heads)
    lengths = jnp.zeros((num_rows,), jnp.int32)
    return build_cache(
        padding, padding, lengths=lengths, layer=while_read, cache_size=cache_size, mesh=mesh
    )


def _pool(shape: tuple[int, int, int, int], *, dtype: DTypeLike, mesh: Mesh | None) -> PagedCache:
    return constrain_cache(PagedCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)), mesh)


def check_stream(layers: Sequence[LayerAttention], *, context: int | None = None) -> None:
    """Refuses layers that positions inside the cache are not for.

    Args:
        layers: of the policy.
        context: positions that the model was trained on, which window and sinks must not exceed.

    Raises:
        ValueError: a layer that needs a full cache, or too wide a window.

    Examples:
        >>> check_stream([LayerAttention(window=64, num_sink_tokens=4)], context=8192)
        >>> check_stream([LayerAttention()])
        Traceback (most recent call last):
            ...
        ValueError: positions: expected a policy whose every layer and head is windowed, ...
    """
    for index, layer in enumerate(layers):
        if layer.needs_full_cache or layer.full_heads or layer.window is None:
            got = "no window"
            if layer.window is not None:
                decodes = layer.needs_full_cache and not layer.full_heads
                got = "FA decode" if decodes else "full heads"
            raise ValueError(
                "positions: expected a policy whose every layer and head is windowed, answers too, "
                f'for "cache", got layer {index} with {got}; use "text", or a policy such as '
                "window=2048,sinks=4"
            )
        width = layer.window + layer.num_sink_tokens
        if context is not None and width > context:
            raise ValueError(
                f"positions: expected window and sinks of at most the model's context of {context} "
                f'tokens for "cache", got {width} in layer {index}; make the window smaller'
            )


def as_stream(ring: LayerCache) -> StreamCache:
    """A ring of keys before RoPE as what it is.

    >>> layer = LayerAttention(window=64, num_sink_tokens=4)
    >>> ring = empty_cache(layer, shape=(1, 2, 16), cache_size=1024, dtype="float32")
    >>> as_stream(ring).num_slots
    68
    """
    assert isinstance(ring, RingCache)
    fields = {field.name: getattr(ring, field.name) for field in dataclasses.fields(ring)}
    return StreamCache(**fields)


def recast_caches(
    caches: Caches, layers: tuple[LayerAttention, ...], *, cache_size: int | None = None
) -> Caches:
    """The same tokens in the caches that another policy asks for.

    Prompts with a tail are read into full caches; once they are, those of windowed layers can be
    rings.

    Args:
        caches: of a prefill.
        layers: the other policy, layer by layer.
        cache_size: the most slots that a ring gets, as in `build_cache`.

    Raises:
        ValueError: a ring cannot become a full cache (its older keys are gone), or the number of
            layers or a layer's full heads differ.

    Examples:
        >>> layer = LayerAttention(window=4, num_sink_tokens=1, full_attention_tail=2)
        >>> full = empty_cache(layer, shape=(1, 2, 16), cache_size=32, dtype="float32")
        >>> read = Caches(layers=(full,), pos_B=jnp.array([20]))  # a prompt of 20 tokens
        >>> recast_caches(read, (layer,)).layers[0].num_slots
        5
    """
    if len(layers) != len(caches.layers):
        raise ValueError(f"layers: expected {len(caches.layers)} of them, got {len(layers)}")
    recast = tuple(
        _recast(cache, layer, pos_B=caches.pos_B, cache_size=cache_size, index=index)
        for index, (cache, layer) in enumerate(zip(caches.layers, layers, strict=True))
    )
    return dataclasses.replace(caches, layers=recast)


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
