"""Who holds which page of the KV cache: a pure Python allocator with exact accounting.

A page is `page_size` consecutive positions of one sequence, in every layer at once. Pages are
handed out lowest free id first, so that a run is reproducible. What it does not do: touch memory,
or share pages between sequences.
"""

from __future__ import annotations

import heapq

from jaxmoe.common.errors import CapacityError


class PageAllocator:
    """Hands out page ids 0..num_pages-1. A page is either free or held, never both; asserts
    say so.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0 and page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))  # a heap
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` positions need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, all or none; CapacityError when there are not so many."""
        if count > len(self._free):
            raise CapacityError(
                f"KV cache: {count} pages wanted, {self.num_free} of {self.num_pages} free; wait "
                "for running requests or give the engine more with kv_cache_gb"
            )
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._held.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives pages back and empties the list, so that its owner cannot use them again."""
        for page in pages:
            assert page in self._held, f"page {page} is not held"
            self._held.remove(page)
            heapq.heappush(self._free, page)
        pages.clear()

    def check(self) -> None:
        """Asserts that every page is either free or held."""
        assert len(set(self._free)) == len(self._free)
        assert self._held.isdisjoint(self._free)
        assert len(self._held) + len(self._free) == self.num_pages
