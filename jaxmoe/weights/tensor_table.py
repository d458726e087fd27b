"""Which stored tensor goes where: the expected tensors held against those a checkpoint has.

`build_table` is complete before any data is read: a tensor that is missing, unknown, of a wrong
shape or dtype, a scale without its weight or a weight without its scale is found here, and all of
them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import get_args

import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.model_registry import experts_path
from jaxmoe.weights.name_map import (
    Matrix,
    NameMap,
    PackedExperts,
    StoredTensor,
    TensorSource,
)
from jaxmoe.weights.param_spec import Formats, ParamSpec, WeightFormat, num_blocks
from jaxmoe.weights.safetensors_header import TensorInfo, show
from jaxmoe.weights.safetensors_reader import Checkpoint

MATRICES: tuple[Matrix, ...] = get_args(Matrix)
_LISTED = 8  # problems named in full; the rest are counted
_DTYPE_OF_FORMAT: Mapping[WeightFormat, str] = {
    "bf16": "BF16",
    "f32": "F32",
    "fp8_block": "F8_E4M3",
}
_SCALE_DTYPES = ("F32", "BF16")


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """A leaf of the module tree, and the stored tensors its values are made of, in order."""

    path: str
    spec: ParamSpec
    source: TensorSource
    infos: tuple[TensorInfo, ...]


@dataclasses.dataclass(frozen=True)
class MatrixPlan:
    """One matrix of one routed expert. `moe_layer_idx` counts MoE layers only.

    weight: the expert's own tensor, or its part of one of all experts. cut: what makes the matrix,
    of `shape [N, K]`, of that part; None where it is stored as it is used.
    """

    moe_layer_idx: int
    expert: int
    which: Matrix
    weight: TensorInfo
    scale: TensorInfo | None
    shape: tuple[int, int]
    cut: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class TensorTable:
    leaves: tuple[LeafPlan, ...]
    matrices: tuple[MatrixPlan, ...]
    layouts: tuple[ExpertLayout, ...]
    ignored: tuple[str, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes a load reads; a tensor that two leaves are cut from counts twice."""
        leaves = sum(info.nbytes for leaf in self.leaves for info in leaf.infos)
        weights = sum(plan.weight.nbytes for plan in self.matrices)
        return leaves + weights + sum(p.scale.nbytes for p in self.matrices if p.scale)


def expert_layouts(config: ModelConfig, formats: Formats) -> tuple[ExpertLayout, ...]:
    """Sizes and format of every MoE layer's experts."""
    return tuple(
        ExpertLayout(
            config.moe.router.num_experts,
            config.moe.expert_intermediate,
            config.hidden_size,
            formats(experts_path(layer)),
        )
        for layer in config.moe_layers
    )


def expert_tensors(
    layout: ExpertLayout, names: NameMap, layer: int, expert: int
) -> dict[Matrix, tuple[StoredTensor, StoredTensor | None]]:
    """The weights of one expert, and their block scales, as a checkpoint must hold them."""
    wanted: dict[Matrix, tuple[StoredTensor, StoredTensor | None]] = {}
    for which in MATRICES:
        if names.packed_experts(layer, which) is not None:
            continue
        name = names.expert_tensor(layer, expert, which)
        n, k = layout.shape(which)
        scale = None
        if layout.format == "fp8_block":
            shape = (num_blocks(n), num_blocks(k))
            scale = StoredTensor(names.scale_tensor(name), shape, _SCALE_DTYPES)
        wanted[which] = (StoredTensor(name, (n, k), (_DTYPE_OF_FORMAT[layout.format],)), scale)
    return wanted


def packed_tensors(
    layout: ExpertLayout, names: NameMap, layer: int
) -> dict[Matrix, tuple[StoredTensor, PackedExperts]]:
    """The tensors that hold a matrix of all experts; gate and up may share one.

    Raises:
      CheckpointError: for formats whose scales would have to be cut too.
    """
    wanted: dict[Matrix, tuple[StoredTensor, PackedExperts]] = {}
    for which in MATRICES:
        packed = names.packed_experts(layer, which)
        if packed is None:
            continue
        if layout.format == "fp8_block":
            raise CheckpointError(
                f"tensor '{packed.tensor}' packs FP8 experts; supported for packed ones: BF16, F32"
            )
        shape = (layout.num_experts, *packed.slab)
        stored = StoredTensor(packed.tensor, shape, (_DTYPE_OF_FORMAT[layout.format],))
        wanted[which] = stored, packed
    return wanted


def _slab(info: TensorInfo, expert: int) -> TensorInfo:
    """One expert's part of a packed tensor."""
    nbytes = info.nbytes // info.shape[0]
    return dataclasses.replace(
        info, shape=info.shape[1:], offset=info.offset + expert * nbytes, nbytes=nbytes
    )


def _rows(info: TensorInfo, first: int, count: int) -> TensorInfo:
    """Some rows of a matrix."""
    row_bytes = info.nbytes // info.shape[0]
    return dataclasses.replace(
        info,
        shape=(count, *info.shape[1:]),
        offset=info.offset + first * row_bytes,
        nbytes=count * row_bytes,
    )


def build_table(
    checkpoint: Checkpoint,
    config: ModelConfig,
    specs: Mapping[str, ParamSpec],
    names: NameMap,
    layouts: tuple[ExpertLayout, ...],
) -> TensorTable:
    """Holds the checkpoint against what the model needs.

    Raises:
      CheckpointError: naming the first tensors that do not fit, with the count of all.
    """
    finder = _Finder(checkpoint)
    leaves = []
    for path, spec in specs.items():
        source = names.tensors_for(path)
        infos = [finder.find(tensor) for tensor in source.tensors]
        leaves.append(LeafPlan(path, spec, source, tuple(i for i in infos if i is not None)))
    matrices = []
    for moe_layer_idx, (layer, layout) in enumerate(zip(config.moe_layers, layouts, strict=True)):
        for which, (stored, packed) in packed_tensors(layout, names, layer).items():
            info = finder.find(stored)
            if info is None or info.shape != stored.shape:
                continue  # a problem, and noted as one
            for expert in range(layout.num_experts):
                part, cut, shape = _slab(info, expert), packed.cut, layout.shape(which)
                if packed.first_row is not None:
                    part, cut = _rows(part, packed.first_row, shape[0]), None
                matrices.append(MatrixPlan(moe_layer_idx, expert, which, part, None, shape, cut))
        for expert in range(layout.num_experts):
            for which, (weight, scale) in expert_tensors(layout, names, layer, expert).items():
                info = finder.find(weight)
                scale_info = None if scale is None else finder.find(scale, scale_of=weight.name)
                if info is not None:
                    shape = layout.shape(which)
                    plan = MatrixPlan(moe_layer_idx, expert, which, info, scale_info, shape)
                    matrices.append(plan)
    ignored = finder.check_rest(names)
    finder.refuse()
    return TensorTable(tuple(leaves), tuple(matrices), layouts, ignored)


class _Finder:
    """Looks up tensors, remembers which were used, and collects what is wrong."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._wanted: dict[str, StoredTensor] = {}
        self._problems: list[str] = []

    def find(self, wanted: StoredTensor, scale_of: str | None = None) -> TensorInfo | None:
        known = wanted.name in self._wanted  # a tensor two leaves are cut from is judged once
        self._wanted[wanted.name] = wanted
        info = self._checkpoint.tensors.get(wanted.name)
        if known:
            return info
        if info is None:
            problem = f"{self._checkpoint.directory}: tensor {show(wanted.name)} is missing"
            if scale_of in self._checkpoint.tensors:
                problem += f": the block scales of FP8 {show(scale_of)}"
            self._problems.append(problem)
            return None
        if info.dtype not in wanted.dtypes:
            self._complain(info, f"stored as {info.dtype}, wanted {' or '.join(wanted.dtypes)}")
        if info.shape != wanted.shape:
            self._complain(
                info, f"shape {list(info.shape)}, wanted {list(wanted.shape)} by config.json"
            )
        return info

    def _complain(self, info: TensorInfo, what: str) -> None:
        self._problems.append(f"{info.file}: tensor {show(info.name)}: {what}")

    def check_rest(self, names: NameMap) -> tuple[str, ...]:
        """Tensors nobody asked for are refused unless the family knows them as not needed."""
        rest = [name for name in self._checkpoint.tensors if name not in self._wanted]
        ignored = tuple(name for name in rest if names.ignored(name))
        unknown = set(rest).difference(ignored)
        if not unknown:
            return ignored
        weights = {names.scale_tensor(name): name for name in self._wanted}
        for name in rest:
            if name not in unknown:
                continue
            what = "is not part of this model; config.json may be of another one"
            weight = weights.get(name)
            if weight is not None:
                stored = self._checkpoint.tensors.get(weight)
                state = f"stored as {stored.dtype}" if stored else "missing"
                what = f"holds block scales, but its weight {show(weight)} is {state}"
            self._complain(self._checkpoint.tensors[name], what)
        return ignored

    def refuse(self) -> None:
        if not self._problems:
            return
        shown = "\n  ".join(self._problems[:_LISTED])
        more = len(self._problems) - _LISTED
        rest = f"\n  and {more} more" if more > 0 else ""
        count = len(self._problems)
        raise CheckpointError(
            f"{self._checkpoint.directory}: {count} tensors do not fit the model:\n  {shown}{rest}"
        )
