"""Writes a checkpoint in the prepared form, piece by piece.

Weights keep their bits, unless the routed experts are asked for in another format: then they are
rounded to it, and what that changed is counted, reported, and said at every start.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxmoe.common.errors import CheckpointError, ConfigError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.formats import FORMATS, check_columns, data_shape, scale_shape
from jaxmoe.quant.int4 import Int4, Int4Format, quantize_int4
from jaxmoe.weights import memory
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.loader import leaf_bytes, plan_load, read_leaf, read_matrix, read_scale
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
    prepared_form,
    read_manifest,
    write_manifest,
)
from jaxmoe.weights.prepared_marks import MANIFEST, ROUNDING, UNFINISHED
from jaxmoe.weights.progress import ByteProgress
from jaxmoe.weights.rounding_log import Rounded, RoundingLog
from jaxmoe.weights.safetensors_header import fail, pread_exactly
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import FORMAT_WORDS, NUMPY_DTYPES
from jaxmoe.weights.stored_form import Forms
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
    rounding: str = ""

    def describe(self) -> str:
        kept = f", {self.kept_pieces} of them kept from before" if self.kept_pieces else ""
        return (
            f"{self.pieces} pieces{kept}; {memory.gib(self.total_bytes)} in {self.seconds:.1f} s; "
            f"peak {memory.gib(self.peak_rss_bytes)} resident"
            + (f"; {self.rounding}" if self.rounding else "")
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
    expert_format: Int4Format | None = None,
    progress: bool | None = None,
) -> ConvertReport:
    """Writes `source` into `output`, or goes on with a conversion that was interrupted there.

    Args:
      source: a checkpoint as shipped, open.
      config: what its config.json says.
      models: `jaxmoe.models.registry`.
      output: a new or empty directory, or one where the same conversion stopped.
      piece_bytes: most bytes of weights in memory at once.
      expert_format: round the routed experts to it; None keeps them as they are.
      progress: draw a bar on stderr; None does where it is a terminal.

    Raises:
      CheckpointError: the source is damaged or not of its config, or the output is something else.
      ConfigError: the experts cannot be rounded to `expert_format`.
    """
    if isinstance(source, PreparedCheckpoint):
        raise CheckpointError(f"{source.directory}: is prepared already; give the original")
    plan = plan_load(source, config, models, "bfloat16", num_threads=1)
    if expert_format is not None:
        _require_roundable(plan.table.layouts, expert_format)
    pieces = _plan_pieces(plan.table.leaves, plan.table.matrices, config, piece_bytes)
    manifest = {piece.name: _arrays_of(piece, config, expert_format) for piece in pieces}
    fingerprint = _fingerprint(source)
    total = sum(map(_piece_bytes, manifest.values()))
    log = RoundingLog(output / ROUNDING) if expert_format is not None else None
    finished = _begin(output, fingerprint, manifest)
    if log is not None:
        finished &= {piece.name for piece in pieces if piece.leaves} | log.read()
    _require_disk(output, total - sum(map(_piece_bytes, (manifest[name] for name in finished))))
    with PieceWriter() as writer, ByteProgress(total, "writing weights", progress) as bar:
        for piece in pieces:
            if piece.name not in finished:
                rounded = None if log is None else log.begin(piece.name)
                arrays = _read_piece(source, piece, manifest[piece.name], expert_format, rounded)
                writer.save(piece_folder(output, piece.name), arrays)
                del arrays
                # Also tells whether this Orbax still writes what prepared.py can read.
                _check_piece(output, piece.name, manifest)
                if log is not None and rounded is not None and piece.experts:
                    log.add(rounded)
            bar.add(_piece_bytes(manifest[piece.name]))
        for name, path in source.companions().items():
            _copy(path, output / name)
        for info in {info.file: info for info in source.tensors.values()}.values():
            source.check_unchanged(info)
        rounding = ""
        if log is not None and expert_format is not None:
            rounding = log.describe(_from(plan.table.layouts), expert_format)
        _write_json(output / MANIFEST, write_manifest(fingerprint, manifest, rounding))
        (output / UNFINISHED).unlink()
        if log is not None:
            log.file.unlink(missing_ok=True)
    return ConvertReport(
        pieces=len(pieces),
        kept_pieces=len(finished),
        total_bytes=total,
        seconds=bar.seconds,
        peak_rss_bytes=memory.peak_rss_bytes(),
        rounding=rounding,
    )


def _require_roundable(layouts: Sequence[ExpertLayout], expert_format: Int4Format) -> None:
    if not layouts:
        raise ConfigError(f"expert format {expert_format}: the model has no routed experts")
    for layout in layouts:
        if FORMATS[layout.format].bits < 8:
            raise ConfigError(
                f"expert format {expert_format}: the experts are {layout.format} already; wanted "
                "BF16, F32 or FP8 ones"
            )
        for which in MATRICES:
            try:
                check_columns(expert_format, layout.shape(which)[1])
            except ValueError as error:
                raise ConfigError(f"{which} of the routed experts: {error}") from None


def _from(layouts: Sequence[ExpertLayout]) -> str:
    return ", ".join(sorted({layout.format for layout in layouts}))


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


def _arrays_of(
    piece: _PiecePlan, config: ModelConfig, expert_format: Int4Format | None
) -> dict[str, StackedArray]:
    """The manifest's entry: leaves as they are, an expert matrix stacked over the experts."""
    specs = {leaf.path: leaf.spec for leaf in piece.leaves}
    arrays = {}
    names = PreparedNames(specs, Forms(lambda path: prepared_form("bf16")))
    for leaf in piece.leaves:
        (tensor,) = names.tensors_for(leaf.path).tensors
        arrays[leaf.path] = StackedArray((leaf.path,), tensor.dtypes[0], tensor.shape, False)
    for position, which in enumerate(MATRICES if piece.experts else ()):
        plans = [expert[position] for expert in piece.experts]
        first, count = plans[0], len(plans)
        form = prepared_form(expert_format or first.form.format)
        layer = config.moe_layers[first.moe_layer_idx]
        weights = tuple(names.expert_tensor(layer, plan.expert, which) for plan in plans)
        shape = (count, *data_shape(form.format, *first.shape))
        arrays[f"{which}.data"] = StackedArray(weights, form.weight_dtype, shape, True)
        scales = scale_shape(form.format, *first.shape)
        if scales is not None:
            scale_names = tuple(map(form.scale_name, weights))
            dtype = form.scale_dtypes[0]
            arrays[f"{which}.scale_inv"] = StackedArray(scale_names, dtype, (count, *scales), True)
    return arrays


def _read_piece(
    source: Checkpoint,
    piece: _PiecePlan,
    arrays: dict[str, StackedArray],
    expert_format: Int4Format | None,
    rounded: Rounded | None,
) -> dict[str, np.ndarray]:
    """The values of a piece. rounded: where what rounding changed is counted."""
    values = {leaf.path: read_leaf(source, leaf) for leaf in piece.leaves}
    for position, which in enumerate(MATRICES if piece.experts else ()):
        array, scale_array = arrays[f"{which}.data"], arrays.get(f"{which}.scale_inv")
        stack = np.empty(array.shape, NUMPY_DTYPES[array.dtype])
        scales = None
        if scale_array is not None:
            scales = np.empty(scale_array.shape, NUMPY_DTYPES[scale_array.dtype])
            values[f"{which}.scale_inv"] = scales
        for i, expert in enumerate(piece.experts):
            plan = expert[position]
            if expert_format is not None:
                assert rounded is not None and scales is not None
                made = _round(source, plan, expert_format)
                stack[i], scales[i] = made.data, made.scale
                rounded.add(made)
                continue
            if not plan.is_made:
                source.read_into(plan.weight, stack[i])
            else:
                stack[i] = read_matrix(source, plan)
            if scales is not None:
                scales[i] = read_scale(source, plan)
        values[f"{which}.data"] = stack
    for name, value in values.items():
        given = (FORMAT_WORDS[value.dtype], value.shape)
        assert given == (arrays[name].dtype, arrays[name].shape), (name, given)
    return values


def _round(source: Checkpoint, plan: MatrixPlan, expert_format: Int4Format) -> Int4:
    scale = None if plan.scale is None else read_scale(source, plan)
    weights = dequantize(plan.form.format, read_matrix(source, plan), scale)
    try:
        return quantize_int4(weights, expert_format)
    except ValueError as error:
        fail(plan.weight.file, str(error), plan.weight.name)


def _piece_bytes(arrays: dict[str, StackedArray]) -> int:
    return sum(nbytes for array in arrays.values() for *_, nbytes in array.tensors())


def _begin(output: Path, fingerprint: str, manifest: Manifest) -> set[str]:
    """Makes the output ready; the pieces that are there already come back."""
    if (output / MANIFEST).exists():
        raise CheckpointError(f"{output}: holds a finished conversion; give a new directory")
    plan = output / UNFINISHED
    if plan.exists():
        was, planned, _ = read_manifest(plan)
        if was != fingerprint:
            raise CheckpointError(
                f"{output}: holds the unfinished conversion of another checkpoint, or the source "
                "has changed since; remove the directory or give a new one"
            )
        if planned != manifest:
            raise CheckpointError(
                f"{output}: holds an unfinished conversion with another piece size or format of "
                "experts; give the same ones again or remove the directory"
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
