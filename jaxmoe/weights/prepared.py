"""The prepared form of a checkpoint: weights on disk as they will lie in memory.

What `jaxmoe_convert` writes (convert.py) and `Checkpoint.open` recognises:

    jaxmoe_prepared.json      the manifest: every piece, its tensors, the source's fingerprint
    config.json, tokenizer…   copied from the source
    weights/<piece>/          an Orbax checkpoint: some leaves, or some stacked experts of one layer

Orbax is told to write uncompressed Zarr arrays of one chunk each, so an array's file is its bytes
and nothing else. They are therefore read here as any checkpoint's are, by pread into place or by
mmap, with the same checks; Orbax itself reads them too. Leaves are already split, transposed and
widened; loading transforms nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.quant.formats import FORMATS, WeightFormat, format_of
from jaxmoe.weights.model_registry import ModelRegistry, experts_path
from jaxmoe.weights.name_map import Matrix, PackedExperts, StoredTensor, TensorSource
from jaxmoe.weights.open_files import OpenFiles
from jaxmoe.weights.param_spec import ParamSpec
from jaxmoe.weights.prepared_marks import MANIFEST, refuse_unfinished
from jaxmoe.weights.safetensors_header import (
    TensorInfo,
    checked_nbytes,
    fail,
    read_json_file,
    show,
)
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import NUMPY_DTYPES
from jaxmoe.weights.stored_form import Forms, StoredForm

VERSION = 1
FOLDER = "weights"
_SCALE = ".scale_inv"


@dataclasses.dataclass(frozen=True)
class StackedArray:
    """One array of a piece. `names` has an entry for each index of the first axis, or is one name
    for the whole array.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    stacked: bool

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape, offset and bytes of each tensor in the array."""
        total = checked_nbytes(self.dtype, list(self.shape))
        assert total is not None
        if not self.stacked:
            yield self.names[0], self.shape, 0, total
            return
        for i, name in enumerate(self.names):
            size = total // len(self.names)
            yield name, self.shape[1:], i * size, size


Piece = Mapping[str, StackedArray]  # array name → what it holds
Manifest = Mapping[str, Piece]  # piece name → its arrays


class PreparedNames:
    """The name map of a prepared checkpoint: a leaf's name is its path, its values are final."""

    def __init__(self, specs: Mapping[str, ParamSpec], forms: Forms) -> None:
        self._specs = specs
        self._forms = forms

    def tensors_for(self, path: str) -> TensorSource:
        spec = self._specs[path]
        scales_of = None
        if spec.kind == "scale_inv":
            data = self._specs[path.removesuffix(_SCALE) + ".data"]
            scales_of = format_of(data.dtype, data.shape, spec.dtype, spec.shape)
        tensor = StoredTensor(path, spec.shape, (_word(spec.dtype),))
        return TensorSource((tensor,), _unchanged, scales_of=scales_of)

    def expert_tensor(self, layer: int, expert: int, which: Matrix) -> str:
        return f"{experts_path(layer)}.{expert}.{which}"

    def packed_experts(self, layer: int, which: Matrix) -> PackedExperts | None:
        return None

    def expert_form(self, layer: int) -> StoredForm:
        return self._forms.stored(experts_path(layer))

    def weight_of_scale(self, name: str) -> str | None:
        return name.removesuffix(_SCALE) if name.endswith(_SCALE) else None

    def ignored(self, name: str) -> bool:
        return False


def _unchanged(array: np.ndarray) -> np.ndarray:
    return array


class PreparedCheckpoint(Checkpoint):
    """A prepared directory, behind the same face as one that was shipped."""

    rounding = ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.rounding,) if self.rounding else ()

    @classmethod
    def open_prepared(cls, directory: Path) -> PreparedCheckpoint:
        """Checks manifest, array headers and file sizes. Raises CheckpointError."""
        refuse_unfinished(directory)
        _, manifest, rounding = read_manifest(directory / MANIFEST)
        tensors: dict[str, TensorInfo] = {}
        files = OpenFiles()
        try:
            for piece_name, piece in manifest.items():
                for info in piece_tensors(directory, piece_name, piece, files):
                    if info.name in tensors:
                        fail(info.file, f"is also in {tensors[info.name].file}", info.name)
                    tensors[info.name] = info
        except BaseException:
            files.close()
            raise
        checkpoint = cls(directory, tensors, files)
        checkpoint.rounding = rounding
        return checkpoint

    def formats(self, config: ModelConfig, models: ModelRegistry) -> Forms:
        def stored(path: str) -> StoredForm:
            if path.endswith(".mlp.experts"):
                name = f"{path}.0.gate"
                scale_name = name + _SCALE
            else:
                name, scale_name = f"{path}.data", path + _SCALE
            if name not in self.tensors:
                raise CheckpointError(f"tensor '{name}' is missing from the prepared checkpoint")
            info, scale = self.tensors[name], self.tensors.get(scale_name)
            try:
                found = format_of(
                    NUMPY_DTYPES[info.dtype].name,
                    info.shape,
                    None if scale is None else NUMPY_DTYPES[scale.dtype].name,
                    None if scale is None else scale.shape,
                )
            except ValueError as error:
                fail(info.file, str(error), name)
            return prepared_form(found)

        return Forms(functools.cache(stored))

    def name_map(
        self,
        config: ModelConfig,
        models: ModelRegistry,
        specs: Mapping[str, ParamSpec],
        formats: Forms,
    ) -> PreparedNames:
        return PreparedNames(specs, formats)


def prepared_form(weight_format: WeightFormat) -> StoredForm:
    """How the routed experts of a format are stored: as they are held."""
    info = FORMATS[weight_format]
    scales = () if info.scale_dtype is None else (_word(info.scale_dtype),)
    return StoredForm(weight_format, _word(info.data_dtype), scale=_SCALE, scale_dtypes=scales)


def _word(dtype: str) -> str:
    return next(word for word, of in NUMPY_DTYPES.items() if of.name == dtype)


def piece_folder(directory: Path, piece_name: str) -> Path:
    return directory / FOLDER / piece_name


def piece_tensors(
    directory: Path, piece_name: str, piece: Piece, files: OpenFiles
) -> Iterator[TensorInfo]:
    """The tensors of a finished piece, their files checked against the manifest."""
    for array_name, array in piece.items():
        folder = piece_folder(directory, piece_name) / array_name
        _check_zarray(folder / ".zarray", array)
        file = folder / (".".join("0" * len(array.shape)) or "0")
        fd = files.add(file, "array of the prepared checkpoint")
        wanted, given = checked_nbytes(array.dtype, list(array.shape)), os.fstat(fd).st_size
        if given != wanted:
            fail(file, f"file has {given} bytes, wanted {wanted}: it is damaged", array.names[0])
        for name, shape, offset, nbytes in array.tensors():
            yield TensorInfo(name, file, array.dtype, shape, offset, nbytes)


def _check_zarray(file: Path, array: StackedArray) -> None:
    """The array must lie in one uncompressed chunk, in C order, as convert.py asked for."""
    header = read_json_file(file, "array header")
    shape = list(array.shape)
    wanted = {
        "zarr_format": 2,
        "shape": shape,
        "chunks": shape,
        "order": "C",
        "compressor": None,
        "filters": None,
        "dtype": _zarr_dtype(array.dtype),
    }
    for key, value in wanted.items():
        if key not in header or header[key] != value:
            given = show(header.get(key))
            fail(file, f"{key} is {given}, wanted {show(value)}", array.names[0])


def _zarr_dtype(word: str) -> str:
    dtype = NUMPY_DTYPES[word]
    return dtype.str if dtype.str[1] in "fiu" and dtype.isbuiltin else dtype.name


def write_manifest(fingerprint: str, manifest: Manifest, rounding: str = "") -> dict[str, Any]:
    """The JSON of a manifest. rounding: in words, what was not taken over exactly."""
    pieces = {
        piece_name: {
            name: {
                "names": list(array.names),
                "dtype": array.dtype,
                "shape": list(array.shape),
                "stacked": array.stacked,
            }
            for name, array in piece.items()
        }
        for piece_name, piece in manifest.items()
    }
    content = {"version": VERSION, "fingerprint": fingerprint, "pieces": pieces}
    return content | ({"rounding": rounding} if rounding else {})


def read_manifest(file: Path) -> tuple[str, Manifest, str]:
    """Fingerprint, pieces and rounding of a manifest; every field is checked."""
    content = read_json_file(file, "manifest")
    version = content.get("version")
    if version != VERSION:
        fail(file, f"version is {show(version)}, this program reads {VERSION}; convert again")
    fingerprint, pieces = content.get("fingerprint"), content.get("pieces")
    if not isinstance(fingerprint, str) or not isinstance(pieces, dict) or not pieces:
        fail(file, "manifest lacks its fingerprint or pieces; convert again")
    rounding = content.get("rounding", "")
    if not isinstance(rounding, str) or not rounding.isprintable() or len(rounding) > 1000:
        fail(file, f"rounding is {show(rounding)}, wanted a line of text; convert again")
    manifest = {
        _plain(name, file): {
            _plain(array_name, file): _array(entry, file, array_name)
            for array_name, entry in _object(piece, file, name).items()
        }
        for name, piece in pieces.items()
    }
    return fingerprint, manifest, rounding


def _object(value: Any, file: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        fail(file, f"piece is {show(value)}, wanted an object", name)
    return value


def _plain(name: str, file: Path) -> str:
    """Names become folders here, so they must be nothing more."""
    if not name.replace(".", "").replace("_", "").replace("-", "").isalnum() or ".." in name:
        fail(file, f"{show(name)} is no name of a piece or array")
    return name


def _array(entry: Any, file: Path, name: str) -> StackedArray:
    entry = _object(entry, file, name)
    names, dtype, shape = entry.get("names"), entry.get("dtype"), entry.get("shape")
    stacked = entry.get("stacked")
    sound = (
        isinstance(names, list)
        and all(isinstance(n, str) for n in names)
        and isinstance(dtype, str)
        and dtype in NUMPY_DTYPES
        and isinstance(shape, list)
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
        and isinstance(stacked, bool)
        and checked_nbytes(dtype, shape) is not None
        and (len(names) == shape[0] if stacked and shape else len(names) == 1)
    )
    if not sound:
        fail(file, f"entry {show(entry)} is not an array's; convert again", name)
    shape = cast("list[int]", shape)
    return StackedArray(tuple(cast("list[str]", names)), str(dtype), tuple(shape), bool(stacked))
