"""How many pages fit a device's memory with weights and rings: arithmetic, before they are made."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swaa_jax.attention import Caches, PagedCache
from swaa_jax.sharding import attention_specs

_MIB, _GIB = 1 << 20, 1 << 30


def device_memory(array: jax.Array) -> int:
    """Bytes that a device of the array has for arrays; CPU devices share the machine's memory.

    The processes of a run plan alike, so it is the least that any of them has, in whole MiB.
    """
    device = min(array.sharding.addressable_devices, key=lambda device: device.id)
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        memory = int(stats["bytes_limit"])
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = machine // len(jax.local_devices(backend=device.platform))
    least = np.int32(memory // _MIB)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        least = np.min(multihost_utils.process_allgather(least))
    return int(least) * _MIB


def bytes_of_arrays(arrays: Iterable[jax.Array]) -> int:
    """What the arrays take on each device; one that is there twice counts once."""
    distinct = {id(array): array for array in arrays}
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in distinct.values()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Bytes of caches on each device: `page` of one page of all layers, `fixed` of the rest."""

    page: int
    fixed: int


def bytes_of_caches(caches: Caches, *, mesh: Mesh | None) -> CacheBytes:
    """What the caches take on each device; they may be shapes alone."""
    page = fixed = 0
    for part in (part for layer in caches.layers for part in layer.parts()):
        is_paged = isinstance(part, PagedCache)
        for leaf in jax.tree.leaves(part):
            shape = leaf.shape
            if mesh is not None:
                spec = PartitionSpec()
                if len(shape) == 4:
                    spec, _ = attention_specs(
                        mesh, batch=shape[0], num_kv_heads=shape[2], whole_rows=is_paged
                    )
                shape = NamedSharding(mesh, spec).shard_shape(shape)
            size = math.prod(shape) * leaf.dtype.itemsize
            if is_paged:
                page += size // leaf.shape[0]
            else:
                fixed += size
    return CacheBytes(page=page, fixed=fixed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What one model's requests take of each device, besides weights.

    Attributes:
        name: of the model.
        fixed_bytes: of rings, and of all that does not depend on the pool.
        page_bytes: of a page of all layers; 0: there are none.
        page_size: tokens of a page.
        pages: that were asked for; None: as many as fit, up to the most.
        most_pages: that all rows can need.
        snapshot_bytes: of one row's rings, kept for reuse; 0: there are none.
        most_snapshots: that may be kept.
    """

    name: str
    fixed_bytes: int
    page_bytes: int
    page_size: int
    pages: int | None
    most_pages: int
    snapshot_bytes: int = 0
    most_snapshots: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one model's requests get: pages of its pool, and snapshots of rings."""

    pages: int
    snapshots: int


def plan_memory(
    needs: Sequence[Needs], *, weight_bytes: int, memory: int, share: float
) -> list[Plan]:
    """How many pages and snapshots each model gets.

    Pools whose size was asked for come first. Of what is left snapshots get a quarter at most; the
    other pools get equal parts of the rest. Nothing gets more than it can use.

    Args:
        needs: of each model.
        weight_bytes: of all models on each device.
        memory: bytes of a device.
        share: of it, for weights, rings and pages together.

    Raises:
        ValueError: they do not fit; the message says what would.
    """
    fixed = sum(each.fixed_bytes for each in needs)
    left = int(share * memory) - weight_bytes - fixed
    within = f"{share:.3g} of a device's {_gib(memory)}"
    others = f"weights of {_gib(weight_bytes)} and rows' own memory of {_gib(fixed)}"
    if left < 0:
        raise ValueError(
            f"memory_share: expected room for {others}, got {within}; lower num_slots or "
            "max_tokens, or raise memory_share"
        )
    pages: dict[int, int] = {}
    for at, each in enumerate(needs):
        if not each.page_bytes:
            pages[at] = each.most_pages  # of no bytes
        elif each.pages is not None:
            fit = left // each.page_bytes
            if each.pages > fit:
                raise ValueError(
                    f"pool_tokens: expected at most {fit * each.page_size} for {each.name!r}, as "
                    f"fit into {within} with {others}, got {each.pages * each.page_size}; ask for "
                    "fewer, or raise memory_share"
                )
            pages[at] = each.pages
            left -= each.pages * each.page_bytes
    quarter = left // 4 // len(needs)
    snapshots = [
        min(each.most_snapshots, quarter // each.snapshot_bytes) if each.snapshot_bytes else 0
        for each in needs
    ]
    left -= sum(count * each.snapshot_bytes for count, each in zip(snapshots, needs, strict=True))
    others_left = [at for at in range(len(needs)) if at not in pages]
    others_left.sort(key=lambda at: needs[at].most_pages * needs[at].page_bytes)
    for done, at in enumerate(others_left):
        each = needs[at]
        pages[at] = min(each.most_pages, left // (len(others_left) - done) // each.page_bytes)
        if not pages[at]:
            raise ValueError(
                f"memory_share: expected room for a page of {each.page_size} tokens "
                f"({_gib(each.page_bytes)}) for {each.name!r} with {others}, got {within}; lower "
                "num_slots, or raise memory_share"
            )
        left -= pages[at] * each.page_bytes
    return [Plan(pages=pages[at], snapshots=count) for at, count in enumerate(snapshots)]


def _gib(count: int) -> str:
    return f"{count / _GIB:.3g} GiB"
