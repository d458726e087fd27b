"""Writes a checkpoint in the prepared form, piece by piece.

A piece is some leaves, or some experts of one layer: at most `piece_bytes` of memory (more only
where one leaf or one expert is larger). A conversion that was killed goes on where it stopped: the
plan is written first, pieces appear whole or not at all, finished ones are checked and kept, and
the manifest that makes the directory a checkpoint is the last thing to appear.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights import memory
from jaxmoe.weights.loader import check_finite, leaf_bytes, plan_load, read_leaf, read_matrix
from jaxmoe.weights.model_registry import ModelRegistry
from jaxmoe.weights.open_files import OpenFiles
from jaxmoe.weights.orbax_store import PieceWriter
from jaxmoe.weights.prepared import (
    FOLDER,
    Manifest,
    PreparedCheckpoint,
    PreparedNames,
    StackedArray,
    piece_folder,
    piece_tensors,
    read_manifest,
    write_manifest,
)
from jaxmoe.weights.prepared_marks import MANIFEST, UNFINISHED
from jaxmoe.weights.progress import ByteProgress
from jaxmoe.weights.safetensors_header import pread_exactly
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import FORMAT_WORDS, NUMPY_DTYPES
from jaxmoe.weights.tensor_table import MATRICES, LeafPlan, MatrixPlan

PIECE_BYTES = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    pieces: int
    kept_pieces: int
    total_bytes: int
    seconds: float
    peak_rss_bytes: int

    def describe(self) -> str:
        kept = f", {self.kept_pieces} of them kept from before" if self.kept_pieces else ""
        return (
            f"{self.pieces} pieces{kept}; {memory.gib(self.total_bytes)} in {self.seconds:.1f} s; "
            f"peak {memory.gib(self.peak_rss_bytes)} resident"
        )


@dataclasses.dataclass(frozen=True)
class _PiecePlan:
    """What a piece will hold: leaves, or one layer's experts from `matrices` (by expert)."""

    name: str
    leaves: tuple[LeafPlan, ...] = ()
    experts: tuple[tuple[MatrixPlan, ...], ...] = ()


def convert(
    source: Checkpoint,
    config: ModelConfig,
    models: ModelRegistry,
    output: Path,
    *,
    piece_bytes: int = PIECE_BYTES,
    progress: bool | None = None,
) -> ConvertReport:
    """Writes `source` into `output`, or goes on with a conversion that was interrupted there.

    Args:
      source: a checkpoint as shipped, open.
      config: what its config.json says.
      models: `jaxmoe.models.registry`.
      output: a new or empty directory, or one where the same conversion stopped.
      piece_bytes: most bytes of weights in memory at once.
      progress: draw a bar on stderr; None does where it is a terminal.

    Raises:
      CheckpointError: the source is damaged or not of its config, or the output is something else.
    """
    if isinstance(source, PreparedCheckpoint):
        raise CheckpointError(f"{source.directory}: is prepared already; give the original")
    plan = plan_load(source, config, models, "bfloat16", num_threads=1)
    pieces = _plan_pieces(plan.table.leaves, plan.table.matrices, config, piece_bytes)
    manifest = {piece.name: _arrays_of(piece, config) for piece in pieces}
    fingerprint = _fingerprint(source)
    total = plan.leaf_bytes + plan.expert_bytes
    finished = _begin(output, fingerprint, manifest)
    _require_disk(output, total - sum(map(_piece_bytes, (manifest[name] for name in finished))))
    with PieceWriter() as writer, ByteProgress(total, "writing weights", progress) as bar:
        for piece in pieces:
            if piece.name not in finished:
                arrays = _read_piece(source, piece, manifest[piece.name])
                writer.save(piece_folder(output, piece.name), arrays)
                del arrays
                # Also tells whether this Orbax still writes what prepared.py can read.
                _check_piece(output, piece.name, manifest)
            bar.add(_piece_bytes(manifest[piece.name]))
        for name, path in source.companions().items():
            _copy(path, output / name)
        for info in {info.file: info for info in source.tensors.values()}.values():
            source.check_unchanged(info)
        _write_json(output / MANIFEST, write_manifest(fingerprint, manifest))
        (output / UNFINISHED).unlink()
    return ConvertReport(
        pieces=len(pieces),
        kept_pieces=len(finished),
        total_bytes=total,
        seconds=bar.seconds,
        peak_rss_bytes=memory.peak_rss_bytes(),
    )


def _plan_pieces(
    leaves: tuple[LeafPlan, ...],
    matrices: tuple[MatrixPlan, ...],
    config: ModelConfig,
    piece_bytes: int,
) -> list[_PiecePlan]:
    """Groups in the order given: a group is closed before it would exceed `piece_bytes`."""
    pieces: list[_PiecePlan] = []
    for group in _groups([(leaf, leaf_bytes(leaf.spec)) for leaf in leaves], piece_bytes):
        pieces.append(_PiecePlan(f"leaves-{len(pieces):04d}", leaves=tuple(group)))
    by_layer: dict[int, dict[int, list[MatrixPlan]]] = {}
    for plan in matrices:
        experts = by_layer.setdefault(plan.moe_layer_idx, {})
        experts.setdefault(plan.expert, []).append(plan)
    for moe_layer_idx, experts in by_layer.items():
        sized = [(tuple(e), sum(m.weight.nbytes for m in e)) for e in experts.values()]
        for i, group in enumerate(_groups(sized, piece_bytes)):
            name = f"experts-{config.moe_layers[moe_layer_idx]:04d}-{i:04d}"
            pieces.append(_PiecePlan(name, experts=tuple(group)))
    return pieces


def _groups(items: list[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    group: list[T] = []
    filled = 0
    for item, size in items:
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size
    if group:
        yield group


def _arrays_of(piece: _PiecePlan, config: ModelConfig) -> dict[str, StackedArray]:
    """The manifest's entry: leaves as they are, an expert matrix stacked over the experts."""
    names = PreparedNames({leaf.path: leaf.spec for leaf in piece.leaves})
    arrays = {}
    for leaf in piece.leaves:
        (tensor,) = names.tensors_for(leaf.path).tensors
        arrays[leaf.path] = StackedArray((leaf.path,), tensor.dtypes[0], tensor.shape, False)
    for position, which in enumerate(MATRICES if piece.experts else ()):
        plans = [expert[position] for expert in piece.experts]
        first, count = plans[0], len(plans)
        layer = config.moe_layers[first.moe_layer_idx]
        weights = tuple(names.expert_tensor(layer, plan.expert, which) for plan in plans)
        info = first.weight
        arrays[f"{which}.data"] = StackedArray(weights, info.dtype, (count, *first.shape), True)
        if first.scale is not None:
            scales = tuple(map(names.scale_tensor, weights))
            shape = (count, *first.scale.shape)
            arrays[f"{which}.scale_inv"] = StackedArray(scales, "F32", shape, True)
    return arrays


def _read_piece(
    source: Checkpoint, piece: _PiecePlan, arrays: dict[str, StackedArray]
) -> dict[str, np.ndarray]:
    values = {leaf.path: read_leaf(source, leaf) for leaf in piece.leaves}
    for position, which in enumerate(MATRICES if piece.experts else ()):
        array = arrays[f"{which}.data"]
        stack = np.empty(array.shape, NUMPY_DTYPES[array.dtype])
        for i, expert in enumerate(piece.experts):
            plan = expert[position]
            if plan.cut is None:
                source.read_into(plan.weight, stack[i])
            else:
                stack[i] = read_matrix(source, plan)
        values[f"{which}.data"] = stack
        if f"{which}.scale_inv" in arrays:
            scales = np.empty(arrays[f"{which}.scale_inv"].shape, np.float32)
            for i, expert in enumerate(piece.experts):
                info = expert[position].scale
                assert info is not None
                stored = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
                source.read_into(info, stored)
                check_finite(info, stored)
                scales[i] = stored
            values[f"{which}.scale_inv"] = scales
    for name, value in values.items():
        given = (FORMAT_WORDS[value.dtype], value.shape)
        assert given == (arrays[name].dtype, arrays[name].shape), (name, given)
    return values


def _piece_bytes(arrays: dict[str, StackedArray]) -> int:
    return sum(nbytes for array in arrays.values() for *_, nbytes in array.tensors())


def _begin(output: Path, fingerprint: str, manifest: Manifest) -> set[str]:
    """Makes the output ready; the pieces that are there already come back."""
    if (output / MANIFEST).exists():
        raise CheckpointError(f"{output}: holds a finished conversion; give a new directory")
    plan = output / UNFINISHED
    if plan.exists():
        was, planned = read_manifest(plan)
        if was != fingerprint:
            raise CheckpointError(
                f"{output}: holds the unfinished conversion of another checkpoint, or the source "
                "has changed since; remove the directory or give a new one"
            )
        if planned != manifest:
            raise CheckpointError(
                f"{output}: holds an unfinished conversion with another piece size; give the same "
                "one again or remove the directory"
            )
        return {name for name in manifest if _is_whole(output, name, manifest)}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: is not an empty directory; give a new one")
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    _write_json(plan, write_manifest(fingerprint, manifest))
    return set()


def _is_whole(output: Path, name: str, manifest: Manifest) -> bool:
    try:
        _check_piece(output, name, manifest)
    except CheckpointError:
        return False  # begun and not finished: written again
    return True


def _check_piece(output: Path, name: str, manifest: Manifest) -> None:
    files = OpenFiles()
    try:
        list(piece_tensors(output, name, manifest[name], files))
    finally:
        files.close()


def _fingerprint(source: Checkpoint) -> str:
    """Tells checkpoints apart by their config, headers, sizes and samples of their data."""
    digest = hashlib.sha256((source.directory / "config.json").read_bytes())
    for path in sorted(source.files):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with open(path, "rb", buffering=0) as file:
            fd = file.fileno()
            (header,) = struct.unpack("<Q", pread_exactly(fd, 8, 0, path))
            digest.update(pread_exactly(fd, min(header, size - 8), 8, path))
            for i in range(_SAMPLES):
                at = (size - _SAMPLE_BYTES) * i // _SAMPLES
                digest.update(os.pread(fd, _SAMPLE_BYTES, max(at, 0)))
    return digest.hexdigest()


def _require_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise CheckpointError(
            f"{output}: {memory.gib(needed)} ({needed} bytes) still to write, {memory.gib(free)} "
            f"({free} bytes) free; make room or give another directory, then run it again"
        )


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _write_json(path: Path, content: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    os.replace(partial, path)
