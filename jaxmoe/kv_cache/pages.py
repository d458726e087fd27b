"""Who holds which page of the KV cache: a pure Python allocator with exact accounting.

A page is `page_size` consecutive positions of one sequence, in every layer at once. A page that is
filled with a prompt may be held by several sequences at a time, and may be kept when nobody holds
it any more (kv_cache/prefix.py says which, and finds them again): such pages are free for the
asking, least recently used first, but only after all others. Unused pages are handed out lowest id
first, so that a run is reproducible. What it does not do: touch memory, or know contents.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable

from jaxmoe.common.errors import CapacityError


class PageAllocator:
    """Hands out page ids 0..num_pages-1. A page is unused, idle (kept for its content) or held by
    one or more; asserts say so.

    on_evict: told of an idle page right before it is handed out for another content.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0 and page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self.on_evict: Callable[[int], None] = lambda page: None
        self._unused = list(range(num_pages))  # a heap
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders: dict[int, int] = {}
        self._kept: set[int] = set()  # become idle, not unused, when nobody holds them

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give, idle ones included."""
        return len(self._unused) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages nobody holds whose content is kept."""
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` positions need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, all or none; CapacityError when there are not so many."""
        if count > self.num_free:
            raise CapacityError(
                f"KV cache: {count} pages wanted, {self.num_free} of {self.num_pages} free; wait "
                "for running requests or give the engine more with kv_cache_gb"
            )
        pages = [self._take() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these held or idle pages."""
        for page in pages:
            assert page in self._holders or page in self._idle, f"page {page} has no content"
            self._idle.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def free(self, pages: list[int]) -> None:
        """Gives pages back and empties the list, so that its owner cannot use them again.

        Of those that become idle the last are the first to be handed out again: a prefix is worth
        keeping longer than what follows it.
        """
        for page in reversed(pages):
            assert page in self._holders, f"page {page} is not held"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._kept:
                self._idle[page] = None
            else:
                heapq.heappush(self._unused, page)
        pages.clear()

    def keep(self, page: int) -> None:
        """The held page's content is final and worth keeping."""
        assert page in self._holders
        self._kept.add(page)

    def holders(self, page: int) -> int:
        return self._holders.get(page, 0)

    def check(self) -> None:
        """Asserts that every page is in exactly one state."""
        unused, idle, held = set(self._unused), set(self._idle), set(self._holders)
        assert len(unused) == len(self._unused)
        assert len(unused) + len(idle) + len(held) == len(unused | idle | held) == self.num_pages
        assert idle <= self._kept and self._kept.isdisjoint(unused)
        assert all(count > 0 for count in self._holders.values())

    def _take(self) -> int:
        if self._unused:
            return heapq.heappop(self._unused)
        page, _ = self._idle.popitem(last=False)
        self._kept.remove(page)
        self.on_evict(page)
        return page
