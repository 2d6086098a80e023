"""How many pages and snapshots fit a device's memory with weights and rings: arithmetic, before any
is made.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from swaa_jax.attention import Caches, PagedCache, cache_specs
from swaa_jax.memory import DeviceMemoryError, gib
from swaa_jax.sharding import lacking_tokens

log = logging.getLogger(__name__)

SLOTS = "num_slots (batch_size of generate)"
"""How messages name the number of rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Bytes of caches on each device: `page` of one page of all layers, `fixed` of the rest."""

    page: int
    fixed: int


def bytes_of_caches(caches: Caches, *, mesh: Mesh | None) -> CacheBytes:
    """What the caches take on each device; they may be shapes alone."""
    page = fixed = 0
    parts: list[Any] = [part for layer in caches.layers for part in layer.parts()]
    for part in parts:
        is_paged = isinstance(part, PagedCache)
        for leaf in jax.tree.leaves(part):
            shape = leaf.shape
            if mesh is not None:
                spec = PartitionSpec()
                if len(shape) == 4:
                    spec = cache_specs(part, mesh).k
                shape = NamedSharding(mesh, spec).shard_shape(shape)
            size = math.prod(shape) * leaf.dtype.itemsize
            if is_paged:
                page += size // leaf.shape[0]
            else:
                fixed += size
    return CacheBytes(page=page, fixed=fixed)


def warn_of_whole_pages(mesh: Mesh | None, page_size: int) -> None:
    """Says so where devices of the mesh's `context` cannot share pages of this size.

    >>> warn_of_whole_pages(None, 48)  # nothing to share
    """
    if lacking_tokens(mesh, page_size):
        log.warning(
            "page_size: expected a multiple of the mesh's context, got %d; full caches are whole "
            "on each of these devices. Give page_size and chunk_size, or lay devices along tensor",
            page_size,
        )


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
        snapshots: that were asked for; None: as many as fit, up to the most.
        most_snapshots: that can be of use.
    """

    name: str
    fixed_bytes: int
    page_bytes: int
    page_size: int
    pages: int | None
    most_pages: int
    snapshot_bytes: int = 0
    snapshots: int | None = None
    most_snapshots: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one model's requests get: pages of its pool, and snapshots of rings."""

    pages: int
    snapshots: int


def plan_memory(
    needs: Sequence[Needs],
    *,
    weight_bytes: int,
    memory: int,
    share: float,
    working_bytes: int = 0,
    would_fit: Callable[[], str] | None = None,
) -> list[Plan]:
    """How many pages and snapshots each model gets.

    What was asked for comes first. Of what is left the other pools get all that they can use, but
    for a quarter, which is the snapshots'; these get what pools leave, too. Models share alike.

    Args:
        needs: of each model.
        weight_bytes: of all models on each device.
        memory: bytes of a device.
        share: of it, for weights, rings, snapshots and pages together.
        working_bytes: that a step computes with, an estimate: less is shared out where the rest of
            the memory is smaller.
        would_fit: says what would where rows do not fit; see `swaa_jax.memory.Demand`.

    Raises:
        DeviceMemoryError: they do not fit; the message says what would.
    """
    fixed = sum(each.fixed_bytes for each in needs)
    room, within = int(share * memory), f"{share:.3g} of a device's {gib(memory)}"
    remedy = "raise memory_share, or split the model over more devices (mesh)"
    if memory - working_bytes < room:
        room = memory - working_bytes
        within = f"a device's {gib(memory)} less {gib(working_bytes)} that a step computes with"
        remedy = "lower chunk_size, or split the model over more devices (mesh)"
    left = room - weight_bytes - fixed

    def told() -> str:
        return "" if would_fit is None else f", where {would_fit()}"

    others = f"weights of {gib(weight_bytes)} and rows' own memory of {gib(fixed)}"
    if left < 0:
        raise DeviceMemoryError(
            f"memory_share: expected room for {others}, got {within}{told()}; lower {SLOTS} or "
            f"max_tokens, {remedy}"
        )
    pages = {at: each.most_pages for at, each in enumerate(needs) if not each.page_bytes}
    snapshots = {at: 0 for at, each in enumerate(needs) if not each.snapshot_bytes}
    # Pools that take what is left have a page at least.
    last = sum(each.page_bytes for each in needs if each.pages is None)

    def take(option: str, name: str, count: int, *, size: int, unit: int = 1) -> int:
        """So many pieces of so many bytes of what is left; messages count them in units."""
        nonlocal left, others
        fit = max(0, left - last) // size
        if count > fit:
            raise DeviceMemoryError(
                f"{option}: expected at most {fit * unit} for {name!r}, as fit into {within} with "
                f"{others}, got {count * unit}; ask for fewer, {remedy}"
            )
        left -= count * size
        others += f", {option} of {name!r} of {gib(count * size)}"
        return count

    for at, each in enumerate(needs):
        if at not in pages and each.pages is not None:
            size, unit = each.page_bytes, each.page_size
            pages[at] = take("pool_tokens", each.name, each.pages, size=size, unit=unit)
        if at not in snapshots and each.snapshots is not None:
            size = each.snapshot_bytes
            snapshots[at] = take("max_snapshots", each.name, each.snapshots, size=size)
    pools = {
        at: _Want(most=each.most_pages, size=each.page_bytes)
        for at, each in enumerate(needs)
        if at not in pages
    }
    copies = {
        at: _Want(most=each.most_snapshots, size=each.snapshot_bytes)
        for at, each in enumerate(needs)
        if at not in snapshots
    }
    for_copies = max(left // 4, left - sum(want.bytes for want in pools.values()))
    snapshots |= _parts(for_copies, copies)
    left -= sum(snapshots[at] * want.size for at, want in copies.items())
    pages |= _parts(left, pools)
    for at, want in pools.items():
        if not pages[at]:
            raise DeviceMemoryError(
                f"memory_share: expected room for a page of {needs[at].page_size} tokens "
                f"({gib(want.size)}) for {needs[at].name!r} with {others}, got {within}{told()}; "
                f"lower {SLOTS} or max_tokens, {remedy}"
            )
    return [Plan(pages=pages[at], snapshots=snapshots[at]) for at in range(len(needs))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Want:
    """Pieces of so many bytes, of which somebody can use so many."""

    most: int
    size: int

    @property
    def bytes(self) -> int:
        return self.most * self.size


def _parts(room: int, wants: Mapping[int, _Want]) -> dict[int, int]:
    """How many pieces each gets: equal parts of the room, and what others cannot use of theirs."""
    parts = {}
    for at, want in sorted(wants.items(), key=lambda item: item[1].bytes):
        parts[at] = min(want.most, room // (len(wants) - len(parts)) // want.size)
        room -= parts[at] * want.size
    return parts
