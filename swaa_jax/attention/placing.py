"""Where caches lie on a mesh: rows over data and fsdp, heads over tensor, slots over context.

A device of `context` has a share of the slots, and of each page the same share, so that a pool has
one table for all devices and what a row holds is spread evenly::

    full cache, 8 slots, context=2      device 0   [ 0 1 2 3 ]      device 1   [ 4 5 6 7 ]
    pages of 4 slots                               [ 0 1 | 4 5 ]               [ 2 3 | 6 7 ]

Rings are small, whatever the length of a row, and whole on every device of `context`.
"""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from swaa_jax.attention.caches import (
    Caches,
    FullCache,
    LayerCache,
    PagedCache,
    RingCache,
    SplitCache,
)
from swaa_jax.attention.shards import Shards
from swaa_jax.sharding import attention_specs, constrain_whole

__all__ = ["cache_specs", "constrain_cache", "constrain_caches", "slot_shards"]

OneCache = TypeVar("OneCache", bound=FullCache | PagedCache | RingCache)


def cache_specs(cache: FullCache | PagedCache | RingCache, mesh: Mesh) -> Any:
    """The partitions of a cache's arrays, in its own form: `k` and `v` are those of `cache.k`.

    >>> from swaa_jax.sharding import make_mesh
    >>> mesh = make_mesh([jax.devices()[0]] * 8, context=4, tensor=2)  # one in place of eight
    >>> x = jax.ShapeDtypeStruct((1, 64, 2, 16), "float32")
    >>> cache_specs(FullCache(k=x, v=x), mesh).k == jax.P(None, "context", "tensor", None)
    True
    """
    is_paged, is_ring = isinstance(cache, PagedCache), isinstance(cache, RingCache)
    batch, num_slots, num_kv_heads = cache.k.shape[:3]
    heads, rows = attention_specs(
        mesh,
        batch=batch,
        num_kv_heads=num_kv_heads,
        num_tokens=None if is_ring else num_slots,
        whole_rows=is_paged,
    )
    specs: Any = {"k": heads, "v": heads}
    if is_ring:
        specs["slot_positions"] = rows
    if isinstance(cache, PagedCache) and cache.table is not None:
        specs["table"] = rows
    return dataclasses.replace(cache, **specs)


def slot_shards(cache: FullCache | PagedCache | RingCache, mesh: Mesh | None) -> Shards | None:
    """How a cache's slots, or those of each page, are split; None: they are whole.

    >>> x = jax.numpy.zeros((1, 64, 2, 16))
    >>> slot_shards(FullCache(k=x, v=x), None) is None
    True
    """
    if mesh is None:
        return None
    return Shards.of(cache_specs(cache, mesh).k, mesh.shape, cache.k.shape[1])


def constrain_cache(cache: OneCache, mesh: Mesh | None) -> OneCache:
    """Keep keys and values split over a mesh as `attend_cached` reads them.

    >>> x = jax.numpy.zeros((1, 64, 2, 16))
    >>> constrain_cache(FullCache(k=x, v=x), None).num_slots  # without a mesh nothing is split
    64
    """
    if mesh is None:
        return cache
    sharding = NamedSharding(mesh, cache_specs(cache, mesh).k)
    k, v = (jax.lax.with_sharding_constraint(x, sharding) for x in (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v)


def constrain_caches(caches: Caches, mesh: Mesh | None) -> Caches:
    """Keep keys and values split over a mesh as `attend_cached` reads them, and all else whole.

    >>> x = jax.numpy.zeros((1, 8, 2, 16))
    >>> caches = Caches(layers=(FullCache(k=x, v=x),), pos_B=jax.numpy.array([0]))
    >>> constrain_caches(caches, None).layers[0].k.shape  # without a mesh nothing is split
    (1, 8, 2, 16)
    """

    def place(cache: LayerCache) -> Any:
        if isinstance(cache, SplitCache):
            full, windowed = place(cache.full), place(cache.windowed)
            return dataclasses.replace(cache, full=full, windowed=windowed)
        cache = constrain_cache(cache, mesh)
        if isinstance(cache, RingCache):
            positions = constrain_whole(cache.slot_positions, mesh)
            cache = dataclasses.replace(cache, slot_positions=positions)
        return cache

    return Caches(
        layers=tuple(map(place, caches.layers)),
        pos_B=constrain_whole(caches.pos_B, mesh),
        table=None if caches.table is None else constrain_whole(caches.table, mesh),
    )
