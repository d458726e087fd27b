"""Pages of sequences that had to give way, kept in host memory until they have pages again.

Without it a preempted sequence's prompt is computed again and its output fed again token by token.
What is put back are the very bits, so a text is the same either way. What it does not do: choose
who gives way (scheduler/).
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxmoe.kv_cache import handoff
from jaxmoe.kv_cache.handoff import Block, Cache
from jaxmoe.request import Sequence


class KeptPages:
    """budget_bytes: of host memory, for all of them. page_bytes: of a page in all layers. caches:
    the page arrays of every layer as they are now.
    """

    def __init__(
        self, budget_bytes: int, page_bytes: int, caches: Callable[[], list[Cache]]
    ) -> None:
        self._budget, self._page_bytes, self._caches = budget_bytes, page_bytes, caches
        self._kept: dict[int, tuple[Sequence, list[Block], int]] = {}
        self.num_kept = self.num_restored = 0  # sequences, since the start

    @property
    def used_bytes(self) -> int:
        return sum(size for _, _, size in self._kept.values())

    def keep(self, seq: Sequence, num_pages: int) -> bool:
        """Copies the sequence's first pages, which it is about to lose; False where there is no
        room, or penalties have counts of its tokens that are not kept.
        """
        if seq.request.params.adjusts_logits or num_pages == 0:
            return False
        first = self._caches()[0][0]
        size = handoff.padded_pages(num_pages) * self._page_bytes
        if self.used_bytes + size > self._budget:
            return False
        host, pages = jax.local_devices(backend="cpu")[0], seq.pages[:num_pages]
        blocks = [handoff.take(cache, pages) for cache in self._caches()]
        if first.devices() != {host}:
            blocks = [handoff.send(block, host) for block in blocks]
        self._kept[id(seq)] = seq, blocks, size
        self.num_kept += 1
        return True

    def restore(self, seq: Sequence, num_pages: int) -> None:
        """Puts what was kept into the sequence's first pages."""
        _, blocks, _ = self._kept.pop(id(seq))
        caches = self._caches()
        for i, block in enumerate(blocks):
            (device,) = caches[i][0].devices()
            caches[i] = handoff.put(caches[i], seq.pages[:num_pages], handoff.send(block, device))
        self.num_restored += 1

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._kept.pop(id(seq), None)
