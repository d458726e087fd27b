"""Which stored tensor goes where: the expected tensors held against those a checkpoint has.

`build_table` is complete before any data is read: a tensor that is missing, unknown, of a wrong
shape or dtype, a scale without its weight or a weight without its scale is found here, and all of
them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

import numpy as np

from jaxmoe.common.errors import CheckpointError, ConfigError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.quant.formats import check_columns, data_shape, scale_shape
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.model_registry import experts_path
from jaxmoe.weights.name_map import (
    Matrix,
    NameMap,
    PackedExperts,
    StoredTensor,
    TensorSource,
)
from jaxmoe.weights.param_spec import Formats, ParamSpec
from jaxmoe.weights.safetensors_header import TensorInfo, show
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.stored_form import StoredForm

MATRICES: tuple[Matrix, ...] = get_args(Matrix)
_LISTED = 8  # problems named in full; the rest are counted
# Missing tensors after which no more are looked for: a config of a far larger model would have
# millions, each with its words, before it is refused.
_ENOUGH = 4000


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

    weight, scale: the expert's own tensors, or its parts of those of all experts, stored in `form`.
    shape: `[N, K]` of the linear map. cut, cut_scale: what makes the matrix, as it is held, of its
    part and the scales of theirs; None where they are stored as they are used. beside: what else
    its scales are made of.
    """

    moe_layer_idx: int
    expert: int
    which: Matrix
    weight: TensorInfo
    scale: TensorInfo | None
    form: StoredForm
    shape: tuple[int, int]
    cut: Callable[[np.ndarray], np.ndarray] | None = None
    cut_scale: Callable[[np.ndarray], np.ndarray] | None = None
    beside: tuple[TensorInfo, ...] = ()

    @property
    def is_made(self) -> bool:
        """Whether the matrix is not held as its bytes lie in the file."""
        return self.cut is not None or self.form.is_repacked

    @property
    def scale_bytes(self) -> int:
        """Of the tensors that its scales are made of."""
        stored = self.beside if self.scale is None else (self.scale, *self.beside)
        return sum(info.nbytes for info in stored)


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
        return leaves + weights + sum(plan.scale_bytes for plan in self.matrices)


def expert_layouts(config: ModelConfig, formats: Formats) -> tuple[ExpertLayout, ...]:
    """Sizes and format of every MoE layer's experts; ConfigError where they do not go together."""
    layouts = []
    for layer in config.moe_layers:
        layout = ExpertLayout(
            config.moe.router.num_experts,
            config.moe.expert_intermediate,
            config.hidden_size,
            formats(experts_path(layer)),
        )
        for which in MATRICES:
            try:
                check_columns(layout.format, layout.shape(which)[1])
            except ValueError as error:
                raise ConfigError(f"{which} of the experts of layer {layer}: {error}") from None
        layouts.append(layout)
    return tuple(layouts)


def expert_tensors(
    layout: ExpertLayout, names: NameMap, layer: int, expert: int
) -> dict[Matrix, tuple[StoredTensor, tuple[StoredTensor, ...]]]:
    """The weights of one expert, and what their scales are made of, as a checkpoint must hold
    them.
    """
    wanted: dict[Matrix, tuple[StoredTensor, tuple[StoredTensor, ...]]] = {}
    form = names.expert_form(layer)
    for which in MATRICES:
        if names.packed_experts(layer, which) is not None:
            continue
        name = names.expert_tensor(layer, expert, which)
        weight = form.weight_tensor(name, data_shape(form.format, *layout.shape(which)))
        scales = scale_shape(form.format, *layout.shape(which))
        wanted[which] = weight, () if scales is None else form.scale_tensors(name, scales)
    return wanted


class PackedTensors(NamedTuple):
    """The tensors that hold a matrix, and its scales, of all experts."""

    packed: PackedExperts
    weight: StoredTensor
    scale: StoredTensor | None


def packed_tensors(layout: ExpertLayout, names: NameMap, layer: int) -> dict[Matrix, PackedTensors]:
    """Where a matrix of all experts lies; gate and up may share a tensor.

    Raises:
      CheckpointError: for formats whose scales the family cannot cut.
    """
    wanted: dict[Matrix, PackedTensors] = {}
    form = names.expert_form(layer)
    for which in MATRICES:
        packed = names.packed_experts(layer, which)
        if packed is None:
            continue
        has_scale = scale_shape(form.format, *layout.shape(which)) is not None
        if has_scale != (packed.scale is not None):
            raise CheckpointError(
                f"tensor '{packed.tensor}' packs {form.format} experts, which this family is not "
                "known to have"
            )
        shape = (layout.num_experts, *packed.slab)
        weight, scale = StoredTensor(packed.tensor, shape, (form.weight_dtype,)), None
        if packed.scale is not None:
            shape = (layout.num_experts, *packed.scale.slab)
            scale = StoredTensor(packed.scale.tensor, shape, form.scale_dtypes)
        wanted[which] = PackedTensors(packed, weight, scale)
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
        finder.expect(source.others)
    matrices = []
    for moe_layer_idx, (layer, layout) in enumerate(zip(config.moe_layers, layouts, strict=True)):
        form = names.expert_form(layer)

        def plan(
            expert: int,
            which: Matrix,
            weight: TensorInfo,
            scale: TensorInfo | None,
            packed: PackedExperts | None = None,
            beside: tuple[TensorInfo, ...] = (),
            *,
            idx: int = moe_layer_idx,
            form: StoredForm = form,
            layout: ExpertLayout = layout,
        ) -> MatrixPlan:
            cut = packed.cut if packed else None
            cut_scale = packed.scale.cut if packed and packed.scale else None
            shape = layout.shape(which)
            return MatrixPlan(
                idx, expert, which, weight, scale, form, shape, cut, cut_scale, beside
            )

        for which, (packed, stored, stored_scale) in packed_tensors(layout, names, layer).items():
            info = finder.find(stored)
            scale_info = None
            if stored_scale is not None:
                scale_info = finder.find(stored_scale, scale_of=stored.name)
            if info is None or info.shape != stored.shape:
                continue  # a problem, and noted as one
            if stored_scale is not None and (
                scale_info is None or scale_info.shape != stored_scale.shape
            ):
                continue
            for expert in range(layout.num_experts):
                scale = None if scale_info is None else _slab(scale_info, expert)
                part = _slab(info, expert)
                if packed.first_row is None:
                    matrices.append(plan(expert, which, part, scale, packed))
                else:
                    part = _rows(part, packed.first_row, layout.shape(which)[0])
                    matrices.append(plan(expert, which, part, scale))
        for expert in range(layout.num_experts):
            for which, (weight, stored_scales) in expert_tensors(
                layout, names, layer, expert
            ).items():
                info = finder.find(weight)
                found = [finder.find(stored, scale_of=weight.name) for stored in stored_scales]
                scale_info, *beside = found or [None]
                if info is not None:
                    there = tuple(b for b in beside if b is not None)
                    matrices.append(plan(expert, which, info, scale_info, beside=there))
                finder.expect(form.others(names.expert_tensor(layer, expert, which)))
    ignored = finder.check_rest(names)
    finder.refuse()
    return TensorTable(tuple(leaves), tuple(matrices), layouts, ignored)


class _Finder:
    """Looks up tensors, remembers which were used, and collects what is wrong."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._wanted: dict[str, StoredTensor] = {}
        self._others: set[str] = set()
        self._problems: list[str] = []

    def expect(self, others: tuple[str, ...]) -> None:
        """Tensors that may be there and are not needed."""
        self._others.update(others)

    def find(self, wanted: StoredTensor, scale_of: str | None = None) -> TensorInfo | None:
        known = wanted.name in self._wanted  # a tensor two leaves are cut from is judged once
        self._wanted[wanted.name] = wanted
        info = self._checkpoint.tensors.get(wanted.name)
        if known:
            return info
        if info is None:
            problem = f"{self._checkpoint.directory}: tensor {show(wanted.name)} is missing"
            if scale_of in self._checkpoint.tensors:
                problem += f": the scales of {show(scale_of)}"
            self._problems.append(problem)
            if len(self._problems) >= _ENOUGH:
                self.refuse()
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
        ignored = tuple(name for name in rest if name in self._others or names.ignored(name))
        unknown = set(rest).difference(ignored)
        if not unknown:
            return ignored
        for name in rest:
            if name not in unknown:
                continue
            what = "is not part of this model; config.json may be of another one"
            weight = names.weight_of_scale(name)
            if weight in self._wanted:
                stored = self._checkpoint.tensors.get(weight)
                state = f"stored as {stored.dtype}" if stored else "missing"
                what = f"holds scales, but its weight {show(weight)} is {state}"
            self._complain(self._checkpoint.tensors[name], what)
        return ignored

    def refuse(self) -> None:
        if not self._problems:
            return
        shown = "\n  ".join(self._problems[:_LISTED])
        more = len(self._problems) - _LISTED
        rest = f"\n  and {more} more" if more > 0 else ""
        count = len(self._problems)
        least = "at least " if count >= _ENOUGH else ""
        raise CheckpointError(
            f"{self._checkpoint.directory}: {least}{count} tensors do not fit the model:\n"
            f"  {shown}{rest}"
        )
