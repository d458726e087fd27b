"""The header of one safetensors file, read and checked before any byte of data is touched.

A safetensors file is: u64 little-endian header length, that many bytes of JSON, then the data. The
JSON maps tensor names to `{"dtype", "shape", "data_offsets": [begin, end]}` (offsets from the start
of the data) and may hold `__metadata__`, a map of strings. Here everything a header can get wrong
is refused with a CheckpointError that names the file and, where there is one, the tensor. The
format's own rules are enforced strictly: the data section is covered by the tensors exactly,
without holes, overlaps or a tail.

What it does not do: open directories or read data (safetensors_reader.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxmoe.common.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_JSON_BYTES = 256 << 20  # an index of a 2-million-tensor checkpoint would be about this long
MAX_RANK = 64  # numpy's own

# Bits a value takes, for every dtype the format knows. Which of them an engine can use is the
# loader's business.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `offset` counts from the start of the file; `dtype` is the format's own
    word.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def show(text: object, limit: int = 120) -> str:
    """A name out of a file, as it may safely stand in a message: quoted, escaped, cut."""
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def fail(file: Path | str, what: str, tensor: str | None = None) -> NoReturn:
    where = f"{file}: " if tensor is None else f"{file}: tensor {show(tensor)}: "
    raise CheckpointError(where + what)


def parse_json(data: bytes, file: Path | str, what: str) -> dict[str, Any]:
    """The JSON object in `data`; anything else, duplicate keys, NaN and runaway nesting are
    refused.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(file, f"{what} has the key {show(key)} twice; download the file again")
                seen.add(key)
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        # Not bytes: json.loads would guess UTF-16 and UTF-32 from them.
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        fail(file, f"{what} is nested too deeply to be one")
    except (
        ValueError
    ) as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        fail(file, f"{what} is not valid JSON ({error}); download the file again")
    if not isinstance(value, dict):
        fail(file, f"{what} is a JSON {type(value).__name__}, wanted an object")
    return value


def open_regular(file: Path, what: str = "file") -> int:
    """A descriptor of a regular file, open for reading. A pipe or device is refused, never waited
    on.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        fail(file, f"{what} is missing; download the checkpoint again")
    except OSError as error:
        fail(file, f"{what} cannot be opened: {error.strerror}")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        fail(file, f"{what} is not a regular file")
    return fd


def read_json_file(file: Path, what: str) -> dict[str, Any]:
    """A JSON object from a whole file, such as config.json or a shard index."""
    fd = open_regular(file, what)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_JSON_BYTES:
            fail(file, f"{what} is {size} bytes long; at most {MAX_JSON_BYTES} make sense")
        data = pread_exactly(fd, size, 0, file)
    finally:
        os.close(fd)
    return parse_json(data, file, what)


def pread_exactly(fd: int, size: int, offset: int, file: Path) -> bytes:
    chunks: list[bytes] = []
    while size:
        try:
            chunk = os.pread(fd, min(size, 1 << 26), offset)
        except OSError as error:
            fail(file, f"reading failed at byte {offset}: {error.strerror}")
        if not chunk:
            fail(file, f"file ends at byte {offset}, {size} bytes early; download it again")
        chunks.append(chunk)
        size -= len(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def read_header(fd: int, file: Path) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file, checked; in the order of their bytes."""
    file_bytes = os.fstat(fd).st_size
    if file_bytes < 8:
        fail(file, f"file is {file_bytes} bytes long, too short for a header; download it again")
    (header_bytes,) = struct.unpack("<Q", pread_exactly(fd, 8, 0, file))
    if header_bytes < 2 or header_bytes > MAX_HEADER_BYTES:
        fail(
            file, f"absurd header length {header_bytes} (2 to {MAX_HEADER_BYTES}): not safetensors"
        )
    if 8 + header_bytes > file_bytes:
        fail(
            file,
            f"header of {header_bytes} bytes in a file of {file_bytes}: the file is cut short; "
            "download it again",
        )
    data = pread_exactly(fd, header_bytes, 8, file)
    if not data.startswith(b"{"):
        fail(file, "header does not begin with '{': not safetensors")
    header = parse_json(data, file, "header")
    _check_metadata(header.pop("__metadata__", None), file)
    data_start = 8 + header_bytes
    tensors = [_tensor(name, entry, file, data_start) for name, entry in header.items()]
    # Empty tensors sort before the one that starts at the same byte.
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(tensors, file, data_start, file_bytes)
    return {info.name: info for info in tensors}


def _check_metadata(metadata: Any, file: Path) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        fail(file, f"__metadata__ is a JSON {type(metadata).__name__}, wanted an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            fail(file, f"__metadata__ {show(key)} is {show(value)}, wanted a string")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        fail(file, f"header entry is {show(entry)}, wanted dtype, shape and data_offsets", name)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        given = ", ".join(show(key, 40) for key in list(entry)[:5])
        fail(file, f"header entry has {given}, wanted dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        fail(file, f"unknown dtype {show(dtype)}; known are {', '.join(DTYPE_BITS)}", name)
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        fail(file, f"shape {show(shape)} is not a list of sizes", name)
    if len(shape) > MAX_RANK:
        fail(file, f"shape has {len(shape)} dimensions, at most {MAX_RANK} make sense", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        fail(file, f"data_offsets {show(offsets)} are not [begin, end]", name)
    begin, end = offsets
    if begin > end or end >= 1 << 63:
        fail(file, f"data_offsets {show(offsets)} run backwards or past any file", name)
    nbytes = checked_nbytes(dtype, shape)
    if nbytes is None:
        fail(file, f"shape {show(shape)} of {dtype} is no whole number of bytes below 2**63", name)
    if nbytes != end - begin:
        fail(
            file,
            f"shape {show(shape)} of {dtype} takes {nbytes} bytes, "
            f"but data_offsets hold {end - begin}",
            name,
        )
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, nbytes)


def checked_nbytes(dtype: str, shape: list[int]) -> int | None:
    """Bytes of a tensor, or None if that overflows 63 bits or is not whole. Python integers do not
    wrap.
    """
    if 0 in shape:
        return 0
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits >= 1 << 66:
            return None
    return None if bits % 8 else bits // 8


def _check_coverage(
    tensors: list[TensorInfo], file: Path, data_start: int, file_bytes: int
) -> None:
    """The tensors, sorted by offset, must cover the data section exactly."""
    for info in tensors:
        if info.offset + info.nbytes > file_bytes:
            fail(
                file,
                f"data reaches byte {info.offset + info.nbytes} of a file of {file_bytes}: "
                "the file is cut short; download it again",
                info.name,
            )
    at = data_start
    for info in tensors:
        if info.offset < at:
            fail(file, f"data overlaps another tensor's by {at - info.offset} bytes", info.name)
        if info.offset > at:
            fail(file, f"there is a hole of {info.offset - at} bytes before the data", info.name)
        at += info.nbytes
    if at != file_bytes:
        fail(file, f"file has {file_bytes - at} bytes after its last tensor; download it again")
