"""A Hugging Face checkpoint directory: its tensors, checked, and a safe way to their bytes.

`Checkpoint.open` reads every shard's header (safetensors_header.py) and holds the shards against
the index; after that each tensor's place, dtype and size are known to be consistent. Data is read
with pread into buffers of the caller: a file that is cut short meanwhile is a CheckpointError,
where a memory map would end the process with SIGBUS. Only safetensors and JSON are ever read;
pickled weights (.bin, .pt) are refused.

What it does not do: decide which tensors a model needs (tensor_table.py) or where they go
(loader.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights.model_registry import ModelRegistry
from jaxmoe.weights.name_map import NameMap
from jaxmoe.weights.open_files import OpenFiles
from jaxmoe.weights.param_spec import ParamSpec
from jaxmoe.weights.prepared_marks import MANIFEST, UNFINISHED
from jaxmoe.weights.safetensors_header import (
    TensorInfo,
    fail,
    read_header,
    read_json_file,
    show,
)
from jaxmoe.weights.stored_form import Forms

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Copied beside prepared weights, and what `text/` and the engine look for.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """A directory's tensors. All reads see the files whose headers were checked, or fail."""

    def __init__(
        self, directory: Path, tensors: Mapping[str, TensorInfo], files: OpenFiles
    ) -> None:
        self.directory = directory
        self.tensors = tensors
        self._files = files

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Reads and checks all headers; no data is touched. Raises CheckpointError."""
        directory = Path(directory)
        if not directory.is_dir():
            kind = "is not a directory" if directory.exists() else "does not exist"
            raise CheckpointError(
                f"{directory}: {kind}; wanted a checkpoint directory (config.json, safetensors)"
            )
        if (directory / MANIFEST).exists() or (directory / UNFINISHED).exists():
            from jaxmoe.weights.prepared import PreparedCheckpoint  # which is built on this class

            return PreparedCheckpoint.open_prepared(directory)
        weight_map = _weight_map(directory)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        files = OpenFiles()
        try:
            shards: dict[str, dict[str, TensorInfo]] = {}
            for name in names:
                path = _shard_path(directory, name)
                fd = files.add(path, "shard named by the index" if weight_map else "file")
                shards[name] = read_header(fd, path)
            tensors = _merge(directory, shards, weight_map)
        except BaseException:
            files.close()
            raise
        return cls(directory, tensors, files)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the start-up report has to say of it."""
        return ()

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files.paths

    def use(self, info: TensorInfo) -> AbstractContextManager[int]:
        """A descriptor of the tensor's file, checked to be the file that was opened."""
        return self._files.use(info.file, info.name)

    def check_unchanged(self, info: TensorInfo) -> None:
        """Refuses a file that was truncated, replaced or written to since its header was
        checked.
        """
        self._files.check_unchanged(info.file, info.name)

    def read_into(self, info: TensorInfo, buffer: np.ndarray | memoryview, start: int = 0) -> None:
        """Fills `buffer` with the tensor's bytes from byte `start` on, with the GIL released.

        Args:
          info: one of `self.tensors`.
          buffer: writable and C-contiguous, any dtype; `info.nbytes - start` bytes or fewer.
          start: the first byte wanted, counted from the tensor's start.
        """
        view = buffer.reshape(-1).view(np.uint8).data if isinstance(buffer, np.ndarray) else buffer
        view = memoryview(view).cast("B")
        if start < 0 or start + len(view) > info.nbytes:
            raise ValueError(f"bytes {start}:{start + len(view)} of {info.name} ({info.nbytes})")
        with self.use(info) as fd:
            _read_fully(fd, view, info, info.offset + start)

    def read(self, info: TensorInfo) -> bytearray:
        """A small tensor's bytes, for tools and tests."""
        data = bytearray(info.nbytes)
        self.read_into(info, memoryview(data))
        return data

    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        return read_json_file(self.directory / "config.json", "config.json")

    def generation_config(self) -> dict[str, Any] | None:
        """generation_config.json, or None where the checkpoint ships none."""
        path = self.directory / "generation_config.json"
        return read_json_file(path, "generation_config.json") if path.exists() else None

    def companions(self) -> dict[str, Path]:
        """The config, tokenizer and template files that are present, by name."""
        found = {name: self.directory / name for name in COMPANION_FILES}
        return {name: path for name, path in found.items() if path.is_file()}

    def formats(self, config: ModelConfig, models: ModelRegistry) -> Forms:
        """How each linear map is stored."""
        return models.stored_formats(config, self.tensors)

    def name_map(
        self,
        config: ModelConfig,
        models: ModelRegistry,
        specs: Mapping[str, ParamSpec],
        formats: Forms,
    ) -> NameMap:
        """Where each leaf comes from."""
        return models.name_map(config, specs, formats, self.tensors)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _read_fully(fd: int, view: memoryview, info: TensorInfo, at: int) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], at + done)
        except OSError as error:
            fail(info.file, f"reading failed at byte {at + done}: {error.strerror}", info.name)
        if count == 0:
            fail(
                info.file,
                f"file ended at byte {at + done} while it was being read; download it again",
                info.name,
            )
        done += count


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor name → shard name from the index, or None for a checkpoint of one file."""
    index, single = directory / INDEX, directory / SINGLE
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            _refuse_without_safetensors(directory)
        return None
    content = read_json_file(index, "index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(index, f"weight_map is {show(weight_map)}, wanted an object of tensor and shard names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            fail(index, f"shard name is {show(shard)}, wanted a file name", tensor)
        if not _is_plain_name(shard):
            fail(
                index, f"shard name {show(shard)} is not a plain file name in the directory", tensor
            )
    if os.path.lexists(single) and SINGLE not in weight_map.values():
        fail(index, f"the index does not name {SINGLE}, which is there too; remove one of them")
    return weight_map


def _is_plain_name(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and len(name) <= 255
        and name.isprintable()  # neither NUL nor lone surrogates
        and not any(c in name for c in "/\\")
    )


def _refuse_without_safetensors(directory: Path) -> NoReturn:
    names = sorted(path.name for path in directory.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        what = f"has {show(shards[0])} but no {INDEX}; download the index too"
    elif pickled:
        what = (
            f"has only pickled weights ({show(pickled[0])}), which can run code when read and are "
            "refused; convert them to safetensors"
        )
    elif any(name.endswith(".gguf") for name in names):
        what = "has GGUF weights, which are not supported; use the original safetensors checkpoint"
    else:
        what = f"has neither {SINGLE} nor {INDEX}; wanted a Hugging Face checkpoint directory"
    raise CheckpointError(f"{directory}: {what}")


def _shard_path(directory: Path, name: str) -> Path:
    """The shard's path, refused if a symbolic link leads out of the checkpoint.

    A Hugging Face cache keeps a snapshot's files as links into the `blobs` folder of the same
    repository; that one place outside is allowed.
    """
    path = directory / name
    root = Path(os.path.realpath(directory))
    real = Path(os.path.realpath(path))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if real.parent not in allowed:
        fail(path, f"is a link to {show(str(real))}, outside the checkpoint; copy the file instead")
    return path


def _merge(
    directory: Path, shards: dict[str, dict[str, TensorInfo]], weight_map: dict[str, str] | None
) -> dict[str, TensorInfo]:
    """All shards' tensors, which must be those of the index."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards.values():
        for name, info in shard.items():
            if name in tensors:
                fail(info.file, f"is also in {tensors[name].file.name}; one of them is stale", name)
            tensors[name] = info
    if weight_map is None:
        return tensors
    index = directory / INDEX
    lacking = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lacking:
        name = lacking[0]
        shard = weight_map[name]
        where = f"it is in {tensors[name].file.name}" if name in tensors else "nor has any other"
        fail(
            index,
            f"the index places it in {shard}, which lacks it ({where}); {len(lacking)} such in all",
            name,
        )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        info = tensors[unlisted[0]]
        fail(info.file, f"is not in the index {INDEX}; {len(unlisted)} such in all", info.name)
    return tensors
