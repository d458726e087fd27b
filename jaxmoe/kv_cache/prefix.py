"""Prefix cache: pages of prompts found again by what they hold.

A page's key is a 128-bit keyed hash of the key of the page before it and its own tokens, so equal
keys mean equal tokens at equal positions after an equal prefix. The hash key is random in every
process, so nobody can prepare two texts of one key; a request's `cache_salt` goes into the key of
the first page, so requests of different salts never meet.

Which pages may be shared. A position's keys and values are written either by the prefill kernels
(prompt tokens) or by the decode kernels (tokens that were drawn). The two families round
differently, and in a prompt every token is computed by prefill. So only pages that prefill filled
entirely are shared: a sequence that finds them reads the very bits it would have computed, and its
text is the same with and without the cache. The answer of an earlier turn that comes back inside
the next prompt is therefore computed once more, by prefill. The last token of a prompt is never
taken from the cache, since its logits are wanted.

What it does not do: hold pages (pages.py counts holders and evicts), or touch memory.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from array import array
from collections.abc import Sequence

from jaxmoe.kv_cache.pages import PageAllocator

_DIGEST_BYTES = 16


class PrefixCache:
    """Finds and publishes pages of one allocator.

    key: of the hash, 16 to 64 bytes; default: random.
    """

    def __init__(self, pages: PageAllocator, key: bytes | None = None) -> None:
        self._pages = pages
        self._key = secrets.token_bytes(32) if key is None else key
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.num_evictions = 0
        pages.on_evict = self._evict

    def __len__(self) -> int:
        """Pages that can be found."""
        return len(self._page_of)

    def page_keys(self, token_ids: Sequence[int], salt: str | None) -> list[bytes]:
        """The keys of all whole pages of a prompt."""
        size = self._pages.page_size
        # The first byte tells no salt from an empty one.
        root = b"\0" if salt is None else b"\1" + salt.encode("utf-8", "surrogatepass")
        parent = self._digest(root)
        keys = []
        for start in range(0, len(token_ids) - size + 1, size):
            tokens = array("i", token_ids[start : start + size])
            parent = self._digest(parent + tokens.tobytes())
            keys.append(parent)
        return keys

    def hold(self, keys: Sequence[bytes], num_prompt: int) -> list[int]:
        """The pages of the longest known beginning of a prompt, held for the caller.

        Never all of the prompt: at least its last token is left to compute.
        """
        pages = []
        for key in keys[: (num_prompt - 1) // self._pages.page_size]:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        self._pages.hold(pages)
        return pages

    def count(self, num_prompt: int, num_found: int) -> None:
        """Notes an admission: prompt tokens asked for, and how many of them were found."""
        self.queried_tokens += num_prompt
        self.hit_tokens += num_found

    def publish(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Makes pages that prefill has filled known by their keys.

        Where two sequences filled equal pages at the same time, the first one's stay known.
        """
        for key, page in zip(keys, pages, strict=True):
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key] = page
                self._key_of[page] = key
                self._pages.keep(page)

    def check(self) -> None:
        """Asserts that both directions agree."""
        assert {page: key for key, page in self._page_of.items()} == self._key_of

    def _evict(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        self.num_evictions += 1

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=self._key).digest()


assert array("i").itemsize == 4 and sys.byteorder == "little"
