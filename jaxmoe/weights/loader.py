"""A checkpoint's weights into memory, once, in parallel, with a plan made first.

Order of events: all headers are known (the checkpoint is open) → the formats of the linear maps →
the model's description → the table of tensors, held against the checkpoint → the memory plan, held
against the machine → only then is memory taken and data read. Non-expert tensors go into aligned
numpy buffers that jax adopts without a copy; experts go from the file straight into the host store.
No weight ever exists twice.

What it does not do: change any weight. Leaves that are cut out of a stored tensor (MLA's
up-projections) or widened (norms) are made by the family's transforms, exactly.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxmoe.common.errors import CheckpointError, ConfigError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.quant.dequantize import nvfp4_scales, uint4_scales
from jaxmoe.quant.formats import WeightFormat
from jaxmoe.weights import memory, shared_store
from jaxmoe.weights.buffers import aligned_empty, is_aligned, to_jax
from jaxmoe.weights.host_store import Backing, HostStore
from jaxmoe.weights.loaded_model import LoadedModel, LoadReport
from jaxmoe.weights.model_registry import ModelRegistry
from jaxmoe.weights.param_spec import Description, ParamSpec
from jaxmoe.weights.progress import ByteProgress
from jaxmoe.weights.read_pool import default_threads, run_all
from jaxmoe.weights.safetensors_header import TensorInfo, fail
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import NUMPY_DTYPES
from jaxmoe.weights.shared_store import StoreName
from jaxmoe.weights.store_name import store_name
from jaxmoe.weights.stored_form import FormError
from jaxmoe.weights.tensor_table import (
    LeafPlan,
    MatrixPlan,
    TensorTable,
    build_table,
    expert_layouts,
)

_log = logging.getLogger(__name__)
_LAYER = re.compile(r"\blayers\.(\d{1,6})\.")


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """Everything decided before the first byte of memory is taken.

    transient_bytes: what transforms may hold beside the result, on all threads together.
    """

    description: Description
    table: TensorTable
    leaf_bytes: int
    expert_bytes: int
    transient_bytes: int

    def memory_bytes(self, backing: Backing) -> int:
        experts = self.expert_bytes
        if backing == "mmap":
            experts -= sum(plan.weight.nbytes for plan in self.table.matrices)
        return self.leaf_bytes + experts + self.transient_bytes


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    models: ModelRegistry,
    runtime: CpuRuntime,
    *,
    compute_dtype: jax.typing.DTypeLike = "bfloat16",
    backing: Backing = "arena",
    shared: bool = False,
    num_threads: int | None = None,
    progress: bool | None = None,
    on_percent: Callable[[float], None] | None = None,
) -> LoadedModel:
    """Loads a checkpoint as shipped, or a prepared one (`Checkpoint.open` tells them apart).

    Args:
      checkpoint: open; may be closed afterwards, whatever the backing.
      config: what its config.json says.
      models: `jaxmoe.models.registry`.
      runtime: decides how the arena is split over NUMA nodes.
      compute_dtype: of the model's activations; weights keep their stored formats.
      backing: see host_store.py; "mmap" starts at once and dies if a file is truncated meanwhile.
      shared: keep the arena in named shared memory (shared_store.py), and take from there what an
        earlier process has loaded; where that cannot be, the report says why.
      num_threads: parallel reads.
      progress: draw a bar on stderr; None does where it is a terminal.
      on_percent: told how many percent of the bytes are read.

    Raises:
      CheckpointError: before reading, if the tensors are not the model's; while reading, if a
        file is damaged. It names file and tensor.
      CapacityError: if the plan does not fit into memory.
    """
    num_threads = default_threads() if num_threads is None else num_threads
    plan = plan_load(checkpoint, config, models, compute_dtype, num_threads)
    planned = plan.memory_bytes(backing)
    name, notes = None, list(checkpoint.notes)
    if shared and backing == "arena" and plan.table.layouts:
        name = store_name(checkpoint, plan.table)
        removed = shared_store.remove_unused(keep=[name.name])
        notes += [f"removed {n}: shared weights that nobody used" for n in removed]
        # What an earlier process has loaded is no longer available, and no longer needed.
        planned -= min(shared_store.present_bytes(name.name), plan.expert_bytes)
    room = memory.require(planned, f"loading {checkpoint.directory}")
    _log.info(
        "%s: loading %s into %s of memory, of %s available",
        checkpoint.directory,
        memory.gib(plan.table.read_bytes),
        memory.gib(planned),
        memory.gib(room),
    )
    store, name = _make_store(runtime, plan, backing, name, notes)
    try:
        read_bytes, found_bytes = plan.table.read_bytes, 0
        if store is not None and name is not None:
            found = [m for m in plan.table.matrices if _is_loaded(store, m)]
            found_bytes = sum(map(_matrix_bytes, found))
            read_bytes -= found_bytes
        if backing == "mmap":
            read_bytes -= sum(matrix.weight.nbytes for matrix in plan.table.matrices)
        with ByteProgress(read_bytes, "loading weights", progress, on_percent) as bar:
            buffers = _read(checkpoint, plan.table, store, backing, num_threads, bar)
            leaves = {path: to_jax(buffer) for path, buffer in buffers.items()}
        for info in {info.file: info for info in checkpoint.tensors.values()}.values():
            checkpoint.check_unchanged(info)
        if store is not None:
            store.seal()
    except BaseException:
        if store is not None:
            store.close()
        raise
    report = LoadReport(
        source=str(checkpoint.directory),
        backing=backing,
        num_tensors=len(checkpoint.tensors) - len(plan.table.ignored),
        ignored=plan.table.ignored,
        leaf_bytes=plan.leaf_bytes,
        expert_bytes=plan.expert_bytes,
        read_bytes=bar.done,
        seconds=bar.seconds,
        planned_bytes=planned,
        peak_rss_bytes=memory.peak_rss_bytes(),
        found_bytes=found_bytes,
        shared_name=name.name if name is not None else None,
        notes=tuple(notes),
    )
    _log.info("%s", report.describe())
    description = plan.description
    state = description.fill(leaves)
    return LoadedModel(description.graphdef, state, description.specs, store, report)


def _make_store(
    runtime: CpuRuntime,
    plan: LoadPlan,
    backing: Backing,
    name: StoreName | None,
    notes: list[str],
) -> tuple[HostStore | None, StoreName | None]:
    """The store, shared under `name` if that can be; what cannot is noted."""
    layouts = plan.table.layouts
    if not layouts:
        return None, None
    if name is not None:
        room, present = shared_store.room_bytes(), shared_store.present_bytes(name.name)
        why = None
        if plan.expert_bytes - present > room:
            why = (
                f"/dev/shm has {memory.gib(room)} free and they need "
                f"{memory.gib(plan.expert_bytes - present)} (enlarge it: mount -o remount,size=...)"
            )
        else:
            try:
                store = HostStore.create(runtime, layouts, backing, name)
            except ConfigError as error:
                why = str(error)
            else:
                if not shared_store.has_huge_pages():
                    notes.append(
                        "experts in shared memory without huge pages: reading them is a little "
                        "slower (echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled)"
                    )
                return store, name
        notes.append(f"experts in private memory, so a restart reads them again: {why}")
    return HostStore.create(runtime, layouts, backing), None


def _is_loaded(store: HostStore, plan: MatrixPlan) -> bool:
    return store.is_loaded(plan.moe_layer_idx, plan.expert, plan.which)


def plan_load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    models: ModelRegistry,
    compute_dtype: jax.typing.DTypeLike,
    num_threads: int,
) -> LoadPlan:
    """Decides everything; reads and allocates nothing. Raises CheckpointError."""
    _check_depth(checkpoint, config)
    try:
        formats = checkpoint.formats(config, models)
        description = models.describe_model(config, compute_dtype, formats)
        layouts = expert_layouts(config, formats)
    except FormError as error:
        raise CheckpointError(f"{checkpoint.directory}: {error}") from error
    except CheckpointError as error:
        _list_all_problems(checkpoint, config, models, compute_dtype)
        raise CheckpointError(f"{checkpoint.directory}: {error}") from error
    names = checkpoint.name_map(config, models, description.specs, formats)
    table = build_table(checkpoint, config, description.specs, names, layouts)
    # A transform may hold its inputs, a copy and its result.
    transient = [
        _copies(leaf) * max(leaf_bytes(leaf.spec), _stored_bytes(leaf)) for leaf in table.leaves
    ]
    return LoadPlan(
        description,
        table,
        leaf_bytes=sum(leaf_bytes(leaf.spec) for leaf in table.leaves),
        expert_bytes=sum(layout.total_bytes for layout in table.layouts),
        transient_bytes=sum(
            sorted(
                [t for t, leaf in zip(transient, table.leaves, strict=True) if _is_made(leaf)]
                + [_made_bytes(m) for m in table.matrices if m.is_made]
            )[-num_threads:]
        ),
    )


def _check_depth(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuses a config of a far deeper model before its modules are made: each has its objects.
    Where a few layers are missing, the table names their tensors.
    """
    found = {int(m[1]) for name in checkpoint.tensors if (m := _LAYER.search(name))}
    if found and config.num_layers > 2 * len(found):
        raise CheckpointError(
            f"{checkpoint.directory}: config.json has {config.num_layers} layers "
            f"(num_hidden_layers), the tensors are of {len(found)}: one of them is of another model"
        )


def _list_all_problems(
    checkpoint: Checkpoint,
    config: ModelConfig,
    models: ModelRegistry,
    compute_dtype: jax.typing.DTypeLike,
) -> None:
    """Where the formats already failed, tells all there is to tell, judged by config.json alone."""
    formats = models.configured_formats(config)
    specs = models.describe_model(config, compute_dtype, formats).specs
    names = checkpoint.name_map(config, models, specs, formats)
    build_table(checkpoint, config, specs, names, expert_layouts(config, formats))


def leaf_bytes(spec: ParamSpec) -> int:
    return math.prod(spec.shape) * np.dtype(jax.numpy.dtype(spec.dtype)).itemsize


def _matrix_bytes(plan: MatrixPlan) -> int:
    """Of a matrix and its scales as they are stored."""
    return plan.weight.nbytes + plan.scale_bytes


# Values in another order are a byte each on the way, and so are the halves they are made of.
_REPACKED_COPIES = 8


def _made_bytes(plan: MatrixPlan) -> int:
    return (_REPACKED_COPIES if plan.form.is_repacked else 2) * _matrix_bytes(plan)


def _copies(leaf: LeafPlan) -> int:
    is_words = any(info.dtype == "I32" for info in leaf.infos)
    return _REPACKED_COPIES if is_words and _is_made(leaf) else 3


def _stored_bytes(leaf: LeafPlan) -> int:
    return sum(info.nbytes for info in leaf.infos)


def _is_made(leaf: LeafPlan) -> bool:
    """Whether the leaf differs from what is stored, so that both exist for a moment."""
    spec = leaf.spec
    return [(i.shape, NUMPY_DTYPES[i.dtype].name) for i in leaf.infos] != [(spec.shape, spec.dtype)]


def _read(
    checkpoint: Checkpoint,
    table: TensorTable,
    store: HostStore | None,
    backing: Backing,
    num_threads: int,
    bar: ByteProgress,
) -> dict[str, np.ndarray]:
    """Reads everything, in the order it lies in the files; the leaves come back."""
    buffers: dict[str, np.ndarray] = {}

    def read(leaf: LeafPlan) -> None:
        buffers[leaf.path] = read_leaf(checkpoint, leaf, bar)

    tasks: list[tuple[TensorInfo, Callable[[], object]]] = [
        (leaf.infos[0], partial(read, leaf)) for leaf in table.leaves
    ]
    if store is not None:
        fill = _read_matrix
        if backing == "mmap":
            files = {plan.weight.file: plan.weight for plan in table.matrices}
            mapped = {file: _map(checkpoint, store, info) for file, info in files.items()}
            fill = partial(_map_matrix, mapped)
        tasks += [
            (m.weight, partial(fill, checkpoint, store, m, bar))
            for m in table.matrices
            if not _is_loaded(store, m)
        ]
    tasks.sort(key=lambda task: (task[0].file, task[0].offset))
    run_all([task for _, task in tasks], num_threads)
    return buffers


def read_leaf(
    checkpoint: Checkpoint, leaf: LeafPlan, bar: ByteProgress | None = None
) -> np.ndarray:
    """One leaf's values in a buffer jax can adopt."""
    stored = []
    for i, info in enumerate(leaf.infos):
        array = aligned_empty(info.shape, NUMPY_DTYPES[info.dtype])
        checkpoint.read_into(info, array)
        if bar is not None:
            bar.add(info.nbytes)
        if leaf.spec.kind == "scale_inv" or i > 0:  # of a leaf of two, the second is of scales
            check_finite(info, array, leaf.source.scales_of)
        stored.append(array)
    try:
        made = leaf.source.transform(*stored)
    except CheckpointError as error:  # of what no header says
        fail(leaf.infos[0].file, str(error), leaf.infos[0].name)
    given, wanted = (made.shape, made.dtype.name), (leaf.spec.shape, leaf.spec.dtype)
    assert given == wanted, (leaf.path, given, wanted)
    if is_aligned(made):
        return made
    result = aligned_empty(made.shape, made.dtype)
    result[...] = made
    return result


def check_finite(
    info: TensorInfo, scale: np.ndarray, weight_format: WeightFormat | None = None
) -> None:
    """Scales must be numbers: one NaN or Inf would spoil every token's output. weight_format: whose
    they are, where they may be stored as they are held.
    """
    if weight_format == "nvfp4" and scale.dtype == np.uint8:
        scale, factor = nvfp4_scales(scale)
        check_finite(info, factor)
    elif scale.dtype == np.uint32:
        scale, _ = uint4_scales(scale)
    elif scale.dtype == np.uint8:
        scale = scale.view(NUMPY_DTYPES["F8_E8M0"])  # whose only NaN is code 255
    finite = np.isfinite(scale.astype(np.float32, copy=False))
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        fail(
            info.file,
            f"scale {where} is {scale[where]}, wanted a finite number; {int((~finite).sum())} "
            "such in all: the file is damaged",
            info.name,
        )


def _read_matrix(
    checkpoint: Checkpoint, store: HostStore, plan: MatrixPlan, bar: ByteProgress
) -> None:
    info = plan.weight
    if plan.is_made:
        made = read_matrix(checkpoint, plan)
        for first_row, rows in store.writable_rows(plan.moe_layer_idx, plan.expert, plan.which):
            rows[...] = made[first_row : first_row + len(rows)]
        bar.add(info.nbytes)
        _read_scale(checkpoint, store, plan, bar)
        return
    with checkpoint.use(info) as fd:
        try:
            store.read_matrix(plan.moe_layer_idx, plan.expert, plan.which, fd, info.offset)
        except OSError as error:
            checkpoint.check_unchanged(info)
            fail(
                info.file,
                f"reading {info.nbytes} bytes at {info.offset} failed: {error}",
                info.name,
            )
    bar.add(info.nbytes)
    _read_scale(checkpoint, store, plan, bar)


def read_matrix(checkpoint: Checkpoint, plan: MatrixPlan) -> np.ndarray:
    """The values of one expert's matrix as they are held."""
    stored = np.empty(plan.weight.shape, NUMPY_DTYPES[plan.weight.dtype])
    checkpoint.read_into(plan.weight, stored)
    return plan.form.hold_weight(stored if plan.cut is None else plan.cut(stored))


def read_scale(checkpoint: Checkpoint, plan: MatrixPlan) -> np.ndarray:
    """The scales of one expert's matrix as they are held, all of them numbers."""
    assert plan.scale is not None
    parts = []
    for info in (plan.scale, *plan.beside):
        stored = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
        checkpoint.read_into(info, stored)
        check_finite(info, stored, plan.form.format)
        parts.append(stored)
    if plan.cut_scale is not None:
        parts[0] = np.ascontiguousarray(plan.cut_scale(parts[0]))
    try:
        return plan.form.hold_scale(*parts)
    except CheckpointError as error:  # of what no header says
        fail(plan.scale.file, str(error), plan.scale.name)


def _map(checkpoint: Checkpoint, store: HostStore, info: TensorInfo) -> int:
    with checkpoint.use(info) as fd:
        try:
            # By descriptor: the file whose header was checked, whatever its name means by now.
            return store.map_file(f"/proc/self/fd/{fd}")
        except OSError as error:
            fail(info.file, f"cannot be mapped: {error}", info.name)


def _map_matrix(
    mapped: dict[Path, int],
    checkpoint: Checkpoint,
    store: HostStore,
    plan: MatrixPlan,
    bar: ByteProgress,
) -> None:
    info = plan.weight
    if plan.is_made:
        fail(
            info.file,
            "holds experts in another layout than they are computed in, which backing=mmap cannot "
            "read in place; use backing=arena, or convert the checkpoint with jaxmoe_convert",
            info.name,
        )
    try:
        store.set_mapped(
            plan.moe_layer_idx, plan.expert, plan.which, mapped[info.file], info.offset
        )
    except ValueError as error:  # a start that no kernel could read from
        fail(info.file, str(error), info.name)
    _read_scale(checkpoint, store, plan, bar)


def _read_scale(
    checkpoint: Checkpoint, store: HostStore, plan: MatrixPlan, bar: ByteProgress
) -> None:
    if plan.scale is None:
        return
    scale = read_scale(checkpoint, plan)
    store.set_scale(plan.moe_layer_idx, plan.expert, plan.which, scale)
    bar.add(plan.scale_bytes)
