"""Pages of one sequence, of all layers, in memory that two processes share: how a process that
computes prompts hands them to the one that decodes, and gets a known beginning from it.

The memory has no name, only a descriptor that the one inherits from the other, and its size is
sealed. Every block has a checksum, which travels with the message that announces it. Who writes
when is the callers' to agree on; nothing here waits.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxmoe.kv_cache.handoff import padded_pages
from jaxmoe.kv_cache.store import PageArray

_ALIGNMENT = 64  # of every array


class SharedPages:
    """layers: the page arrays of every layer (models/decoder.py: `cache_spec`). num_pages: of each.

    Raises: ValueError where the memory behind `fd` has not the size that these take.
    """

    def __init__(
        self, fd: int, layers: Sequence[Sequence[PageArray]], num_pages: int, page_size: int
    ) -> None:
        self.fd, self.num_pages = fd, num_pages
        shapes, total = _shapes(layers, num_pages, page_size)
        if (size := os.fstat(fd).st_size) != total:
            raise ValueError(f"the shared pages have {size} bytes, wanted {total}")
        self._memory = mmap.mmap(fd, total)
        self._arrays = [
            [np.ndarray(shape, dtype, self._memory, offset) for shape, dtype, offset in layer]
            for layer in shapes
        ]

    @classmethod
    def create(
        cls, layers: Sequence[Sequence[PageArray]], num_pages: int, page_size: int
    ) -> SharedPages:
        """Memory is taken when it is written to."""
        fd = os.memfd_create("jaxmoe_pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _shapes(layers, num_pages, page_size)[1])
            # What is cut off while it is mapped would kill who reads it.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return cls(fd, layers, num_pages, page_size)
        except BaseException:
            os.close(fd)
            raise

    def write(self, layer: int, first: int, count: int, block: Sequence[jax.Array]) -> int:
        """Copies `count` pages of a block (handoff.py) to those from `first` on, once they are
        computed: their checksum.
        """
        checksum = 0
        for array, part in zip(self._arrays[layer], block, strict=True):
            pages = array[first : first + count]
            pages[...] = np.asarray(part)[:count]
            checksum = _crc32(pages, checksum)
        return checksum

    def read(self, layer: int, first: int, count: int, checksum: int) -> tuple[np.ndarray, ...]:
        """A block of its own with these pages. Raises: ValueError where they are not what was
        written.
        """
        found, block = 0, []
        for array in self._arrays[layer]:
            # Not zeroed: what a block has behind its pages is dropped.
            pages = np.empty((padded_pages(count), *array.shape[1:]), array.dtype)
            pages[:count] = array[first : first + count]
            found = _crc32(pages[:count], found)
            block.append(pages)
        if found != checksum:
            raise ValueError(
                f"pages {first} to {first + count - 1} of layer {layer} are not those that were "
                f"written: checksum {found:08x}, wanted {checksum:08x}"
            )
        return tuple(block)

    def close(self) -> None:
        """Nothing may be read or written afterwards."""
        self._arrays.clear()
        self._memory.close()
        os.close(self.fd)


def _crc32(pages: np.ndarray, before: int) -> int:
    return zlib.crc32(memoryview(pages.reshape(-1).view(np.uint8)), before)  # pyright: ignore


def _shapes(
    layers: Sequence[Sequence[PageArray]], num_pages: int, page_size: int
) -> tuple[list[list[tuple[tuple[int, ...], np.dtype, int]]], int]:
    """Shape, dtype and offset of every array, and the bytes of all."""
    out, end = [], 0
    for layer in layers:
        arrays = []
        for a in layer:
            shape = (num_pages, a.slots(page_size), a.num_heads, a.head_dim)
            arrays.append((shape, np.dtype(a.dtype), end))
            end += -(-int(np.prod(shape)) * a.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        out.append(arrays)
    return out, end
