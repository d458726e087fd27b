"""The one resident copy of the routed experts: Python face of the native store (design: HostStore).

A store holds, for every MoE layer and expert, three row-major matrices (gate and up `[F, D]`, down
`[D, F]`) in the checkpoint's own format (quant/formats.py), and their scales. Compiled programs
reach it by its registry `id`; nothing here ever makes a second copy.

Backings:
  arena: anonymous memory, huge pages, split over the NUMA nodes, filled by pread. The default. It
    may lie in named shared memory instead (shared_store.py), which a later process finds filled.
  mmap: the checkpoint's own files, mapped. Starts at once and shares the page cache, but a file
  that is
    truncated or replaced in place while mapped kills the process (SIGBUS), and one NUMA node holds
    it all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.host_store import NativeHostStore, native_host_store
from jaxmoe.quant.formats import FORMATS, data_shape, scale_shape
from jaxmoe.weights.name_map import Matrix
from jaxmoe.weights.param_spec import DTYPE_OF_FORMAT, WeightFormat
from jaxmoe.weights.shared_store import StoreName

Backing = Literal["arena", "mmap"]
_WHICH: dict[Matrix, int] = {"gate": 0, "up": 1, "down": 2}
NUMPY_OF_FORMAT: dict[WeightFormat, np.dtype] = {
    weight_format: np.dtype(jnp.dtype(name)) for weight_format, name in DTYPE_OF_FORMAT.items()
}


class ExpertLayout(NamedTuple):
    """Sizes of one MoE layer's routed experts."""

    num_experts: int
    intermediate: int
    hidden: int
    format: WeightFormat

    def shape(self, which: Matrix) -> tuple[int, int]:
        """`[N, K]` of a matrix, in weights."""
        if which == "down":
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden

    def data_shape(self, which: Matrix) -> tuple[int, int]:
        """Of a matrix as it is stored: rows, and elements of the format's dtype in one."""
        return data_shape(self.format, *self.shape(which))

    @property
    def matrix_bytes(self) -> int:
        return self.intermediate * self.hidden * FORMATS[self.format].bits // 8

    def scale_shape(self, which: Matrix) -> tuple[int, int] | None:
        """Of the scales of a matrix, or None where the format has none."""
        return scale_shape(self.format, *self.shape(which))

    @property
    def scale_dtype(self) -> np.dtype | None:
        """Of the scales of a matrix, or None where the format has none."""
        name = FORMATS[self.format].scale_dtype
        return None if name is None else np.dtype(jnp.dtype(name))

    @property
    def total_bytes(self) -> int:
        """Weights and scales of all experts."""
        size = 0 if self.scale_dtype is None else self.scale_dtype.itemsize
        scales = size * sum(int(np.prod(self.scale_shape(w) or (0,))) for w in _WHICH)
        return self.num_experts * (3 * self.matrix_bytes + scales)


class HostStore:
    """Owns the native store. Reads and fills of distinct matrices may run on many threads."""

    def __init__(
        self, native: NativeHostStore, layouts: Sequence[ExpertLayout], backing: Backing
    ) -> None:
        self.native = native
        self.layouts = tuple(layouts)
        self.backing: Backing = backing

    @classmethod
    def create(
        cls,
        runtime: CpuRuntime,
        layouts: Sequence[ExpertLayout],
        backing: Backing = "arena",
        shared: StoreName | None = None,
    ) -> HostStore:
        """Allocates (arena) or prepares (mmap) the store, or attaches to a shared one. Nothing is
        filled yet but what an earlier process has filled.

        Raises: ConfigError, also where a shared one cannot be had.
        """
        name, fingerprint = ("", b"") if shared is None else shared
        native = native_host_store(runtime, layouts, backing, name, fingerprint)
        return cls(native, layouts, backing)

    @property
    def id(self) -> int:
        return self.native.id

    @property
    def total_bytes(self) -> int:
        return self.native.total_bytes

    def bytes_per_node(self) -> list[int]:
        return list(self.native.bytes_per_node())

    def read_matrix(self, layer: int, expert: int, which: Matrix, fd: int, offset: int) -> None:
        """Reads one matrix's bytes from a file into the arena, with the GIL released.

        Raises OSError where the file fails or ends early.
        """
        self.native.read_matrix(layer, expert, _WHICH[which], fd, offset)

    def is_loaded(self, layer: int, expert: int, which: Matrix) -> bool:
        """Whether the matrix and its scales are there."""
        return self.native.is_loaded(layer, expert, _WHICH[which])

    def seal(self) -> None:
        """All is loaded: a shared store is read-only from now on, and others may attach."""
        self.native.seal()

    def map_file(self, path: Path | str) -> int:
        """Maps a file of a store backed by mmap; the result is for `set_mapped`."""
        return self.native.map_file(str(path))

    def set_mapped(
        self, layer: int, expert: int, which: Matrix, file_idx: int, offset: int
    ) -> None:
        self.native.set_mapped(layer, expert, _WHICH[which], file_idx, offset)

    def set_scale(self, layer: int, expert: int, which: Matrix, scale: np.ndarray) -> None:
        """Copies a matrix's scales, in the dtype and shape of the format.

        Raises ValueError for others, and for an e8m0 scale of 255 (NaN).
        """
        self.native.set_scale(layer, expert, _WHICH[which], scale)

    def matrix(self, layer: int, expert: int, which: Matrix) -> np.ndarray:
        """The bytes of a matrix in a one-node arena, uint8 `[N, row_bytes]`: a view, not a copy."""
        return self.native.matrix(layer, expert, _WHICH[which])

    def writable_rows(
        self, layer: int, expert: int, which: Matrix
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The matrix's memory for one that fills it: first row and values `[rows, K]`, per node,
        or bytes `[rows, K/2]` of a four-bit format.

        Only an arena is writable. The matrix counts as loaded once all its rows were yielded.
        """
        dtype = NUMPY_OF_FORMAT[self.layouts[layer].format]
        for first_row, _, rows in self.native.segments(layer, expert, _WHICH[which]):
            yield first_row, rows.view(dtype)
        self.native.mark_loaded(layer, expert, _WHICH[which])

    def scale(self, layer: int, expert: int, which: Matrix) -> np.ndarray:
        """The scales of a matrix, read-only: a view where one NUMA node holds them, else a copy."""
        return self.native.scale(layer, expert, _WHICH[which])

    def close(self) -> None:
        self.native.close()
