"""Writes safetensors files piece by piece, so that no more than one tensor is ever in memory.

The format wants all sizes in the header before the first byte of data; a `ShardWriter` is therefore
told every tensor's dtype and shape first and then takes the data in the same order. A file appears
under its final name only when it is complete.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np

from jaxmoe.weights.safetensors_header import checked_nbytes

# The numpy dtype of every format word that numpy (with ml_dtypes) can hold.
NUMPY_DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "C64": np.dtype(np.complex64),
}
FORMAT_WORDS: Mapping[np.dtype, str] = {dtype: word for word, dtype in NUMPY_DTYPES.items()}


class ShardWriter:
    """One safetensors file, written in the order its tensors were announced.

    Args:
      path: the final file; until `close` the data lies in `<path>.partial`.
      tensors: (name, format dtype word, shape) of every tensor.
      metadata: the header's `__metadata__`.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._left: list[tuple[str, str, tuple[int, ...], int]] = []
        header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        end = 0
        for name, dtype, shape in tensors:
            nbytes = checked_nbytes(dtype, list(shape))
            if nbytes is None or name in header:
                raise ValueError(f"{name}: {dtype} {shape} cannot be stored, or is given twice")
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + nbytes],
            }
            end += nbytes
            self._left.append((name, dtype, tuple(shape), nbytes))
        self._left.reverse()
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data section starts 8-byte aligned
        self._file = open(self._partial, "wb", buffering=1 << 20)  # noqa: SIM115
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, data: np.ndarray) -> None:
        """The next tensor's values; its name, dtype and shape must be those announced."""
        expected, dtype, shape, _ = self._left.pop()
        given = (name, FORMAT_WORDS[data.dtype], data.shape)
        if given != (expected, dtype, shape):
            raise ValueError(f"given {given}, wanted {(expected, dtype, shape)} next")
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Puts the file under its final name. All announced tensors must have been written."""
        if self._left:
            self._discard()
            raise ValueError(f"{len(self._left)} tensors of {self._path} were not written")
        self._file.close()
        os.replace(self._partial, self._path)

    def _discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A whole safetensors file from arrays in memory."""
    listed = [(name, FORMAT_WORDS[data.dtype], data.shape) for name, data in tensors.items()]
    with ShardWriter(path, listed) as writer:
        for name, data in tensors.items():
            writer.write(name, data)


def write_checkpoint(
    directory: Path, tensors: Mapping[str, np.ndarray], *, num_shards: int = 1
) -> None:
    """`model.safetensors`, or that many shards with their index, from arrays in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return
    names = list(tensors)
    shards = [names[i::num_shards] for i in range(num_shards)]
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{num_shards:05d}.safetensors"
        write_file(directory / file, {name: tensors[name] for name in shard})
        weight_map.update(dict.fromkeys(shard, file))
    write_index(directory, weight_map, sum(data.nbytes for data in tensors.values()))


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)
