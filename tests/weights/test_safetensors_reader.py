"""Checkpoint directories: what is read, and that every kind of damage is refused by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support.checkpoints import INDEX, SHARD_1, SHARD_2, join, some_tensors, split, write

from jaxmoe.common.errors import CheckpointError
from jaxmoe.weights.safetensors_header import DTYPE_BITS
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import NUMPY_DTYPES, ShardWriter, write_file


def load_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(checkpoint.read(info), NUMPY_DTYPES[info.dtype]).reshape(info.shape)
        for name, info in checkpoint.tensors.items()
    }


def assert_same(given: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert given[name].dtype == value.dtype and given[name].shape == value.shape, name
        assert given[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("num_shards", [1, 2])
def test_reads_back_bit_exact(tmp_path: Path, num_shards: int) -> None:
    tensors = write(tmp_path, num_shards)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_same(load_all(checkpoint), tensors)
        assert checkpoint.total_bytes == sum(value.nbytes for value in tensors.values())
        assert len(checkpoint.files) == num_shards


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_same(load_all(checkpoint), tensors)


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {k: v for k, v in some_tensors().items() if v.dtype != ml_dtypes.float8_e4m3fn}
    write_file(tmp_path / "m.safetensors", tensors)
    assert_same(safetensors.numpy.load_file(tmp_path / "m.safetensors"), tensors)


def test_every_dtype_of_the_writer_is_known_to_the_reader() -> None:
    for word, dtype in NUMPY_DTYPES.items():
        assert DTYPE_BITS[word] == 8 * dtype.itemsize


def test_part_of_a_tensor(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        info = checkpoint.tensors["d.table"]
        part = np.zeros(3, np.int64)
        checkpoint.read_into(info, part, start=16)
        np.testing.assert_array_equal(part, tensors["d.table"].reshape(-1)[2:5])
        with pytest.raises(ValueError, match="d.table"):
            checkpoint.read_into(info, part, start=48)


# --- one file's header ------------------------------------------------------------------------

Header = dict[str, Any]


def edit(change: Callable[[Header], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        header, data = split(file)
        change(header)
        join(file, header, data)

    return apply


def text(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        header, data = split(file)
        join(file, change(json.dumps(header)), data)

    return apply


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return apply


def entry(tensor: str, **values: Any) -> Callable[[Path], None]:
    return edit(lambda header: header[tensor].update(values))


def shift(header: Header, first: str, by: int) -> None:
    """Moves `first` and all tensors behind it."""
    start = header[first]["data_offsets"][0]
    for name, value in header.items():
        if name != "__metadata__" and value["data_offsets"][0] >= start:
            value["data_offsets"] = [offset + by for offset in value["data_offsets"]]


# name: (damage, what the message must say, the tensor it must name)
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "empty file": (raw(lambda b: b""), "too short for a header", None),
    "seven bytes": (raw(lambda b: b[:7]), "too short for a header", None),
    "header length zero": (raw(lambda b: struct.pack("<Q", 0) + b[8:]), "absurd header", None),
    "header length huge": (raw(lambda b: b"\xff" * 8 + b[8:]), "absurd header length", None),
    "header length past the end": (
        raw(lambda b: struct.pack("<Q", len(b)) + b[8:]),
        "the file is cut short",
        None,
    ),
    "cut in the header": (raw(lambda b: b[:50]), "the file is cut short", None),
    "cut in the data": (raw(lambda b: b[:-1]), "the file is cut short", "e.scalar"),
    "a byte too many": (raw(lambda b: b + b"\0"), "1 bytes after its last tensor", None),
    "garbage": (text(lambda t: b"\x93NUMPY" + t.encode()), "not safetensors", None),
    "not JSON": (text(lambda t: t[:-1]), "not valid JSON", None),
    "not UTF-8": (text(lambda t: t.replace("a.weight", "\xff").encode("latin1")), "JSON", None),
    "UTF-16": (text(lambda t: t.encode("utf-16-le")), "not valid JSON", None),
    "two objects": (text(lambda t: t + "{}"), "not valid JSON", None),
    "deep": (text(lambda t: '{"a":' + "[" * 100_000), "nested too deeply", None),
    "long integer": (text(lambda t: '{"a":' + "1" * 5000 + "}"), "not valid JSON", None),
    "NaN": (text(lambda t: '{"a": NaN}'), "not valid JSON", None),
    "duplicate tensor": (
        text(lambda t: t[:-1] + ', "a.weight": {}}'),
        "'a.weight' twice",
        None,
    ),
    "duplicate key in a tensor": (
        text(lambda t: t.replace('"dtype"', '"shape": [], "dtype"', 1)),
        "'shape' twice",
        None,
    ),
    "metadata not strings": (edit(lambda h: h["__metadata__"].update(a=1)), "__metadata__", None),
    "metadata not an object": (edit(lambda h: h.update(__metadata__=[])), "__metadata__", None),
    "tensor not an object": (edit(lambda h: h.update({"c.bias": 3})), "header entry", "c.bias"),
    "no shape": (edit(lambda h: h["c.bias"].pop("shape")), "wanted dtype, shape", "c.bias"),
    "unknown key": (entry("c.bias", extra=1), "wanted dtype, shape", "c.bias"),
    "unknown dtype": (entry("c.bias", dtype="F33"), "unknown dtype 'F33'", "c.bias"),
    "dtype not a string": (entry("c.bias", dtype=["F32"]), "unknown dtype", "c.bias"),
    "shape not a list": (entry("c.bias", shape="3"), "is not a list of sizes", "c.bias"),
    "negative size": (entry("c.bias", shape=[-3]), "is not a list of sizes", "c.bias"),
    "fractional size": (entry("c.bias", shape=[3.0]), "is not a list of sizes", "c.bias"),
    "boolean size": (entry("b.weight", shape=[True, 15]), "is not a list of sizes", "b.weight"),
    "many dimensions": (entry("c.bias", shape=[1] * 65), "65 dimensions", "c.bias"),
    "overflowing shape": (
        entry("c.bias", shape=[2**32, 2**32, 3]),
        "no whole number of bytes below 2**63",
        "c.bias",
    ),
    "wrapping shape": (  # 2**64 + 12 bytes: 12 if the product wrapped at 64 bits
        entry("c.bias", shape=[2**62 + 3]),
        "no whole number of bytes below 2**63",
        "c.bias",
    ),
    "half a byte": (entry("c.bias", dtype="F4", shape=[23]), "no whole number", "c.bias"),
    "shape of another size": (entry("c.bias", shape=[4]), "takes 16 bytes", "c.bias"),
    "dtype of another size": (entry("c.bias", dtype="F64"), "takes 24 bytes", "c.bias"),
    "offsets not a pair": (entry("c.bias", data_offsets=[0]), "not [begin, end]", "c.bias"),
    "offsets negative": (entry("c.bias", data_offsets=[-12, 0]), "not [begin, end]", "c.bias"),
    "offsets fractional": (entry("c.bias", data_offsets=[0, 12.0]), "not [begin, end]", "c.bias"),
    "offsets backwards": (entry("c.bias", data_offsets=[12, 0]), "run backwards", "c.bias"),
    "offsets past any file": (
        entry("c.bias", data_offsets=[2**64, 2**64 + 12]),
        "past any file",
        "c.bias",
    ),
    "offsets past this file": (
        entry("c.bias", data_offsets=[10**9, 10**9 + 12]),
        "the file is cut short",
        "c.bias",
    ),
    "overlap": (edit(lambda h: shift(h, "c.bias", -2)), "overlaps another", "c.bias"),
    "two tensors in one place": (
        edit(lambda h: h.update(copy=dict(h["b.weight"]))),
        "overlaps another",
        None,
    ),
    "hole": (
        lambda file: (
            (edit(lambda h: shift(h, "c.bias", 4))(file), raw(lambda b: b + b"1234")(file)) and None
        ),
        "a hole of 4 bytes",
        "c.bias",
    ),
    "hole at the start": (
        lambda file: (
            (
                edit(lambda h: shift(h, "a.weight", 4))(file),
                raw(lambda b: b + b"1234")(file),
            )
            and None
        ),
        "a hole of 4 bytes",
        "a.weight",
    ),
    "tensor dropped": (edit(lambda h: h.pop("c.bias")), "a hole of 12 bytes", "d.table"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_header_is_refused(tmp_path: Path, name: str) -> None:
    damage, message, tensor = DAMAGE[name]
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    damage(file)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert tensor is None or f"tensor '{tensor}'" in str(caught.value)


def test_hostile_names_are_escaped_and_cut(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    edit(lambda h: h.update({"\x1b[2J\n" + "x" * 500: 1}))(file)
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\nxxx") as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_tensor_names_are_never_paths(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"../../etc/x": np.ones(2, np.float32)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert load_all(checkpoint).keys() == {"../../etc/x"}


# --- the directory ----------------------------------------------------------------------------


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return apply


def place(shard: Any) -> Callable[[Path], None]:
    """Says in the index that b.weight is in `shard`."""
    return edit_index(lambda index: index["weight_map"].update({"b.weight": shard}))


def in_both(directory: Path) -> None:
    tensors = some_tensors()
    second = [name for i, name in enumerate(tensors) if i % 2]
    write_file(directory / SHARD_2, {name: tensors[name] for name in ["b.weight", *second]})


def pipe(directory: Path) -> None:
    (directory / SHARD_1).unlink()
    os.mkfifo(directory / SHARD_1)


def link_out(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    (directory / SHARD_1).rename(outside)
    (directory / SHARD_1).symlink_to(outside)


DIRECTORY_DAMAGE: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "missing shard": (lambda d: (d / SHARD_1).unlink(), SHARD_1, ["missing"]),
    "swapped shards": (
        lambda d: (
            [(d / a).rename(d / b) for a, b in ((SHARD_1, "x"), (SHARD_2, SHARD_1))]
            and (d / "x").rename(d / SHARD_2)
        ),
        INDEX,
        ["lacks it", f"it is in {SHARD_2}"],
    ),
    "shard cut": (
        lambda d: os.truncate(d / SHARD_2, (d / SHARD_2).stat().st_size - 1),
        SHARD_2,
        ["cut short"],
    ),
    "shard is a pipe": (pipe, SHARD_1, ["not a regular file"]),
    "shard is a folder": (
        lambda d: ((d / SHARD_1).unlink(), (d / SHARD_1).mkdir()),
        SHARD_1,
        ["not a regular file"],
    ),
    "shard links out": (link_out, SHARD_1, ["outside the checkpoint"]),
    "index lacks a tensor": (
        edit_index(lambda i: i["weight_map"].pop("b.weight")),
        SHARD_1,
        ["'b.weight'", "is not in the index"],
    ),
    "index has one more": (
        edit_index(lambda i: i["weight_map"].update({"g.weight": SHARD_1})),
        INDEX,
        ["'g.weight'", f"{SHARD_1}, which lacks it", "nor has any other"],
    ),
    "index names another shard": (place(SHARD_2), INDEX, ["'b.weight'", "which lacks it"]),
    "tensor in two shards": (in_both, SHARD_2, ["'b.weight'", f"is also in {SHARD_1}"]),
    "shard name is a path": (place("../x.safetensors"), INDEX, ["'b.weight'", "plain file name"]),
    "shard name is absolute": (place("/etc/passwd"), INDEX, ["'b.weight'", "plain file name"]),
    "shard name is dots": (place(".."), INDEX, ["'b.weight'", "plain file name"]),
    "shard name has NUL": (place("a\0b"), INDEX, ["'b.weight'", "plain file name"]),
    "shard name is a surrogate": (place("\ud800"), INDEX, ["'b.weight'", "plain file name"]),
    "shard name is a number": (place(3), INDEX, ["'b.weight'", "wanted a file name"]),
    "no weight_map": (edit_index(lambda i: i.pop("weight_map")), INDEX, ["weight_map is None"]),
    "empty weight_map": (edit_index(lambda i: i["weight_map"].clear()), INDEX, ["weight_map"]),
    "weight_map a list": (edit_index(lambda i: i.update(weight_map=[1])), INDEX, ["weight_map"]),
    "index not JSON": (lambda d: (d / INDEX).write_text("{"), INDEX, ["not valid JSON"]),
    "index not an object": (lambda d: (d / INDEX).write_text("[]"), INDEX, ["wanted an object"]),
    "index has a key twice": (
        lambda d: (d / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        INDEX,
        ["'a' twice"],
    ),
    "index is a folder": (
        lambda d: ((d / INDEX).unlink(), (d / INDEX).mkdir()),
        INDEX,
        ["not a regular file"],
    ),
    "index and single file": (
        lambda d: write_file(d / "model.safetensors", some_tensors()),
        INDEX,
        ["does not name model.safetensors"],
    ),
    "no index": (lambda d: (d / INDEX).unlink(), "", [SHARD_1, "download the index"]),
}


@pytest.mark.parametrize("name", DIRECTORY_DAMAGE)
def test_damaged_directory_is_refused(tmp_path: Path, name: str) -> None:
    damage, file, messages = DIRECTORY_DAMAGE[name]
    directory = tmp_path / "model"
    write(directory, num_shards=2)
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert str(directory / file) in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((), "has neither model.safetensors nor"),
        (("pytorch_model.bin",), "pickled weights"),
        (("consolidated.pt",), "pickled weights"),
        (("model.gguf",), "GGUF"),
    ],
)
def test_directory_without_safetensors(
    tmp_path: Path, present: tuple[str, ...], message: str
) -> None:
    for name in present:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "file")


def test_hub_cache_layout_is_followed(tmp_path: Path) -> None:
    """A hub cache's snapshot holds links into the blobs folder of the same repository."""
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    blobs.mkdir(parents=True)
    tensors = write(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    with Checkpoint.open(snapshot) as checkpoint:
        assert_same(load_all(checkpoint), tensors)


# --- damage while reading -----------------------------------------------------------------------


def test_truncated_after_opening(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(file, 600)
        with pytest.raises(CheckpointError, match="while it was being read") as caught:
            load_all(checkpoint)
    assert str(file) in str(caught.value) and "tensor 'a.weight'" in str(caught.value)


def test_truncated_between_check_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    real = os.preadv

    with Checkpoint.open(tmp_path) as checkpoint:
        end = checkpoint.tensors["c.bias"].offset + 3

        def cut_then_read(fd: int, buffers: list[memoryview], offset: int) -> int:
            os.truncate(file, end)
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", cut_then_read)
        with pytest.raises(CheckpointError, match="'c.bias': file ended at byte"):
            checkpoint.read(checkpoint.tensors["c.bias"])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:5]], at))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_same(load_all(checkpoint), tensors)


def test_disk_error_names_file_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match="Input/output error") as caught:
            checkpoint.read(checkpoint.tensors["c.bias"])
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "'c.bias'" in str(caught.value)


def test_rewritten_while_reading(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    with Checkpoint.open(tmp_path) as checkpoint:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        with open(file, "r+b") as handle:
            handle.write(data)
        os.utime(file, ns=(1, 1))
        with pytest.raises(CheckpointError, match="was written to"):
            load_all(checkpoint)


def test_failed_open_closes_its_files(tmp_path: Path) -> None:
    write(tmp_path, num_shards=2)
    os.truncate(tmp_path / SHARD_2, 100)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_companion_files(tmp_path: Path) -> None:
    write(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.companions() == {} and checkpoint.generation_config() is None
        with pytest.raises(CheckpointError, match="config.json is missing"):
            checkpoint.config()
        (tmp_path / "config.json").write_text('{"a": 1}')
        (tmp_path / "generation_config.json").write_text("[]")
        assert checkpoint.config() == {"a": 1}
        assert checkpoint.companions().keys() == {"config.json", "generation_config.json"}
        with pytest.raises(CheckpointError, match="generation_config.json is a JSON list"):
            checkpoint.generation_config()


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted"):
        with ShardWriter(tmp_path / "m.safetensors", [("a", "F32", (2,))]) as writer:
            writer.write("a", np.ones(3, np.float32))
    with pytest.raises(ValueError, match="not written"):
        with ShardWriter(tmp_path / "m.safetensors", [("a", "F32", (2,))]):
            pass
    assert not (tmp_path / "m.safetensors").exists()
