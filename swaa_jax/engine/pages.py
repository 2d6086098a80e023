"""Who has which page of the pool, and which prompts' pages are kept: bookkeeping on the host."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reused(Generic[Snapshot]):
    """The beginning of a prompt that has been read before.

    Attributes:
        num_tokens: how long it is, whole chunks.
        pages: that hold it; not held for the one who asks.
        snapshot: of the rings behind it; None where there are none.
    """

    num_tokens: int
    pages: tuple[int, ...]
    snapshot: Snapshot | None


@dataclasses.dataclass(kw_only=True)
class _Node(Generic[Snapshot]):
    """A chunk behind those of its parents.

    Attributes:
        parent: the chunk before; None: it is a prompt's first.
        pages: its own.
        snapshot: of the rings behind it; None: not kept, so that reading cannot go on from here.
        num_children: chunks behind it that are kept.
    """

    parent: "_Node[Snapshot] | None"
    key: Hashable
    pages: tuple[int, ...]
    snapshot: Snapshot | None
    num_children: int = 0


class PrefixCache(Generic[Snapshot]):
    """Chunks of prompts that were read, by their tokens and by all that stands before them.

        prompt      [ chunk A | chunk B | chunk C | rest ]     pages of A, B, C are kept,
        snapshots             ^                   ^            and the rings at some chunks' ends

    Only whole chunks that a prompt's reading made are kept: another prompt would compute the same
    numbers from them, to the bit. The pages of a chunk are held once for it; what was used last
    goes last, and never before the chunks behind it.

    Args:
        pool: where the pages are from; None: there are rings only.
        chunk_size: tokens of a chunk.
        max_snapshots: how many snapshots of rings are kept; None: there are no rings, and every
            chunk's end is a place to go on from.
    """

    def __init__(self, pool: PagePool | None, *, chunk_size: int, max_snapshots: int | None):
        self._pool, self._chunk_size, self._max_snapshots = pool, chunk_size, max_snapshots
        self._nodes: collections.OrderedDict[Hashable, _Node[Snapshot]] = collections.OrderedDict()
        self._snapshots: collections.OrderedDict[Hashable, None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_snapshots(self) -> int:
        """Snapshots that are kept."""
        return len(self._snapshots)

    def find(self, tokens: Sequence[int]) -> Reused[Snapshot]:
        """The longest beginning of a prompt that is kept, and shorter than the prompt."""
        pages: list[int] = []
        best = Reused[Snapshot](num_tokens=0, pages=(), snapshot=None)
        node, size = None, self._chunk_size
        for end in range(size, len(tokens), size):
            node = self._nodes.get(self._key(node, tokens[end - size : end]))
            if node is None:
                break
            self._nodes.move_to_end(node.key)
            pages += node.pages
            if self._max_snapshots is None or node.snapshot is not None:
                best = Reused(num_tokens=end, pages=tuple(pages), snapshot=node.snapshot)
                if node.snapshot is not None:
                    self._snapshots.move_to_end(node.key)
        return best

    def keep(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        *,
        snapshot: Snapshot | None = None,
    ) -> None:
        """Keeps the last chunk of what was read, if the chunks before it are kept.

        Args:
            tokens: of the prompt so far, whole chunks.
            pages: that hold them, and perhaps more behind; the one who read them holds them.
            snapshot: of the rings behind the chunk.
        """
        node, size = None, self._chunk_size
        for end in range(size, len(tokens), size):
            node = self._nodes.get(self._key(node, tokens[end - size : end]))
            if node is None:
                return
        last = tokens[len(tokens) - size :]
        key = self._key(node, last)
        known = self._nodes.get(key)
        if known is None:
            own: tuple[int, ...] = ()
            if self._pool is not None:
                before, after = len(tokens) - size, len(tokens)
                own = tuple(pages[self._pool.pages_for(before) : self._pool.pages_for(after)])
                self._pool.hold(own)
            known = _Node(parent=node, key=key, pages=own, snapshot=None)
            self._nodes[key] = known
            if node is not None:
                node.num_children += 1
        self._nodes.move_to_end(key)
        if snapshot is not None and known.snapshot is None:
            known.snapshot = snapshot
            self._snapshots[key] = None
        while self._max_snapshots is not None and len(self._snapshots) > self._max_snapshots:
            oldest, _ = self._snapshots.popitem(last=False)
            node = self._nodes[oldest]
            node.snapshot = None
            while node is not None and not node.num_children and node.snapshot is None:
                self._drop(node)  # nobody can go on from here
                node = node.parent
        while len(self._nodes) > _MAX_CHUNKS:
            self._drop(next(node for node in self._nodes.values() if not node.num_children))

    def make_room(self, num_pages: int) -> None:
        """Lets chunks go until so many pages are free, or nothing more can be let go."""
        assert self._pool is not None
        while self._pool.num_free < num_pages:
            # Oldest first; a page that a row still holds would not become free.
            victim = next(
                (
                    node
                    for node in self._nodes.values()
                    if not node.num_children
                    and all(self._pool.holders(page) == 1 for page in node.pages)
                ),
                None,
            )
            if victim is None:
                return
            self._drop(victim)

    def clear(self) -> None:
        """Lets all go."""
        while self._nodes:
            self._drop(next(n for n in reversed(self._nodes.values()) if not n.num_children))

    def _drop(self, node: _Node[Snapshot]) -> None:
        del self._nodes[node.key]
        self._snapshots.pop(node.key, None)
        if node.parent is not None:
            node.parent.num_children -= 1
        if self._pool is not None:
            self._pool.release(node.pages)

    @staticmethod
    def _key(parent: _Node[Any] | None, tokens: Sequence[int]) -> Hashable:
        """Equal for equal tokens after the same chunks; a parent that is kept is one object."""
        return (None if parent is None else id(parent), tuple(tokens))
