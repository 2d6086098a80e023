"""Who has which page of the pool: bookkeeping on the host."""

import collections
from collections.abc import Sequence


class PagePool:
    """Pages by number, each with how many hold it.

    Args:
        num_pages: in the pool.
        page_size: tokens of a page.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, num_pages: int, page_size: int):
        for name, count in (("num_pages", num_pages), ("page_size", page_size)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
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
