"""Who has which page of the pool, and which prompts' pages are kept: bookkeeping on the host."""

import array
import collections
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

Snapshot = TypeVar("Snapshot")

_MAX_CHUNKS = 1 << 16
"""Chunks whose tokens are kept on the host, where rings alone bound nothing."""


class PagePool:
    """Pages by number, each with how many hold it.

    Args:
        num_pages: in the pool.
        page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = collections.deque(range(num_pages))
        self._holders = [0] * num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int] | None:
        """So many pages, held once; None, and nothing changes, where there are not as many."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Holds pages once more that somebody holds already."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Lets them go; those that nobody holds any more are free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free already"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


@dataclasses.dataclass(eq=False, kw_only=True)
class Place(Generic[Snapshot]):
    """The end of a chunk that is kept, behind those of its parents; or the beginning of prompts.

    Attributes:
        parent: the chunk before; None: the beginning of prompts.
        pages: of the chunk.
        snapshot: of the rings behind it; None: not kept.
        num_children: chunks behind it that are kept.
    """

    parent: "Place[Snapshot] | None"
    key: Hashable
    pages: tuple[int, ...]
    snapshot: Snapshot | None = None
    num_children: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reused(Generic[Snapshot]):
    """The beginning of a prompt that has been read before.

    Attributes:
        num_tokens: how long it is, whole chunks.
        pages: that hold it; not held for the one who asks.
        snapshot: of the rings behind it; None where there are none.
        place: where reading goes on; None: nothing is kept of what is read.
    """

    num_tokens: int = 0
    pages: tuple[int, ...] = ()
    snapshot: Snapshot | None = None
    place: Place[Snapshot] | None = None


class PrefixCache(Generic[Snapshot]):
    """Chunks of prompts that were read, by their tokens and by all that stands before them.

        prompt      [ chunk A | chunk B | chunk C | rest ]     pages of A, B, C are kept,
        snapshots             ^                   ^            and the rings at some chunks' ends

    Only whole chunks that a prompt's reading made are kept: another prompt would compute the same
    numbers from them, to the bit. The pages of a chunk are held once for it; what was used last
    goes last, and never before the chunks behind it. A chunk is used when it is read, and when a
    prompt begins with it; a snapshot, when it is taken, and when a prompt goes on from it.

    Args:
        pool: where the pages are from; None: there are rings only.
        chunk_size: tokens of a chunk.
        max_snapshots: how many snapshots of rings are kept; None: there are no rings, and every
            chunk's end is a place to go on from.
        tail: last tokens of a prompt that are read in another way than the rest, so that a chunk
            with some of them serves no other prompt, nor does another chunk serve it.
    """

    def __init__(
        self,
        pool: PagePool | None,
        *,
        chunk_size: int,
        max_snapshots: int | None,
        tail: int = 0,
    ):
        self._pool, self._chunk_size, self._max_snapshots = pool, chunk_size, max_snapshots
        self._tail = tail
        self._start = Place[Snapshot](parent=None, key=None, pages=())
        self._places: collections.OrderedDict[Hashable, Place[Snapshot]] = collections.OrderedDict()
        self._snapshots: collections.OrderedDict[Hashable, None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_snapshots(self) -> int:
        """Snapshots that are kept."""
        return len(self._snapshots)

    def most_kept(self, prompt_length: int) -> int:
        """Tokens of a prompt that may be kept: those of its whole chunks before the tail."""
        return max(0, prompt_length - self._tail) // self._chunk_size * self._chunk_size

    def find(self, tokens: Sequence[int]) -> Reused[Snapshot]:
        """The longest beginning of a prompt that is kept, and shorter than the prompt."""
        pages: list[int] = []
        best = Reused[Snapshot](place=self._start)
        place, size = self._start, self._chunk_size
        for end in range(size, min(self.most_kept(len(tokens)) + 1, len(tokens)), size):
            known = self._places.get(_key(place, tokens[end - size : end]))
            if known is None:
                break
            place = known
            self._places.move_to_end(place.key)
            pages += place.pages
            if self._max_snapshots is None or place.snapshot is not None:
                best = Reused(
                    num_tokens=end, pages=tuple(pages), snapshot=place.snapshot, place=place
                )
        if best.snapshot is not None and best.place is not None:
            self._snapshots.move_to_end(best.place.key)
        return best

    def keep(
        self,
        place: Place[Snapshot] | None,
        tokens: Sequence[int],
        pages: Sequence[int],
        *,
        snapshot: Snapshot | None = None,
    ) -> Place[Snapshot] | None:
        """Keeps a chunk that was read.

        Args:
            place: where it begins: what `find` or the chunk before gave.
            tokens: of the chunk, a whole one.
            pages: that hold it; the one who read it holds them.
            snapshot: of the rings behind it.

        Returns:
            the chunk's end; None where the chunks before were let go meanwhile, so that this one
            is not kept either.
        """
        if place is None or not (place is self._start or self._places.get(place.key) is place):
            return None
        key = _key(place, tokens)
        known = self._places.get(key)
        if known is None:
            known = Place(parent=place, key=key, pages=tuple(pages))
            if self._pool is not None:
                self._pool.hold(known.pages)
            self._places[key] = known
            place.num_children += 1
        self._places.move_to_end(key)
        if snapshot is not None:
            known.snapshot = snapshot if known.snapshot is None else known.snapshot
            self._snapshots[key] = None
            self._snapshots.move_to_end(key)
        while self._max_snapshots is not None and len(self._snapshots) > self._max_snapshots:
            self._forget_snapshot(self._places[next(iter(self._snapshots))])
        while len(self._places) > _MAX_CHUNKS:
            self._drop(next(each for each in self._places.values() if not each.num_children))
        return known

    def _forget_snapshot(self, place: Place[Snapshot]) -> None:
        del self._snapshots[place.key]
        place.snapshot = None
        at: Place[Snapshot] | None = place
        while at is not None and at is not self._start:
            if at.num_children or at.snapshot is not None:
                break
            self._drop(at)  # nobody can go on from here
            at = at.parent

    def make_room(self, num_pages: int) -> None:
        """Lets chunks go until so many pages are free; none if there would not be as many."""
        assert self._pool is not None
        if self._pool.num_free + sum(map(self._num_unheld, self._places.values())) < num_pages:
            return
        while self._pool.num_free < num_pages:
            # Oldest first; a page that a row still holds would not become free.
            victim = next(
                (
                    place
                    for place in self._places.values()
                    if not place.num_children and self._num_unheld(place)
                ),
                None,
            )
            if victim is None:
                return
            self._drop(victim)

    def _num_unheld(self, place: Place[Snapshot]) -> int:
        """Pages that become free with the place: all, or none where a row holds them."""
        assert self._pool is not None
        is_held = any(self._pool.holders(page) > 1 for page in place.pages)
        return 0 if is_held else len(place.pages)

    def clear(self) -> None:
        """Lets all go."""
        while self._places:
            self._drop(next(p for p in reversed(self._places.values()) if not p.num_children))

    def _drop(self, place: Place[Snapshot]) -> None:
        assert place.parent is not None and not place.num_children
        del self._places[place.key]
        self._snapshots.pop(place.key, None)
        place.snapshot = None  # whoever still looks at the place does not hold its memory
        place.parent.num_children -= 1
        if self._pool is not None:
            self._pool.release(place.pages)


def _key(parent: Place[Any], tokens: Sequence[int]) -> Hashable:
    """Equal for equal tokens after the same chunks; a parent that is kept is one object."""
    return id(parent), array.array("q", tokens).tobytes()
