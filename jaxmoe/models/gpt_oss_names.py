"""Tensor names of gpt-oss, and the cut of its packed experts.

One tensor holds all experts of a layer, inputs first, gate and up in alternate columns:

    gate_up_proj [E, D, 2F], gate_up_proj_bias [E, 2F];  down_proj [E, F, D], down_proj_bias [E, D]

In MXFP4 outputs come first, gate and up in alternate rows, in groups of 32 inputs:

    gate_up_proj_blocks [E, 2F, D/32, 16], gate_up_proj_scales [E, 2F, D/32];  down_proj_blocks ...
"""

from __future__ import annotations

from functools import partial

import numpy as np

from jaxmoe.models.names import FLOAT_DTYPES, to_float32
from jaxmoe.models.qwen3_moe_names import Qwen3MoeNames
from jaxmoe.quant.formats import FORMATS
from jaxmoe.weights.name_map import Matrix, PackedExperts, StoredTensor, TensorSource

_TENSOR: dict[Matrix, str] = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
_FIRST: dict[Matrix, int] = {"gate": 0, "up": 1}


class GptOssNames(Qwen3MoeNames):
    modules = {**Qwen3MoeNames.modules, "mlp.router.logits": "mlp.router"}
    leaves = {"attention.sinks": "self_attn.sinks"}

    def expert_tensor(self, layer: int, expert: int, which: Matrix) -> str:
        return self._in_layer(layer, f"mlp.experts.{_TENSOR[which]}")

    def weight_name(self, path: str) -> str:
        name = self.module_name(path)
        return name if path.endswith(".mlp.experts") else name + ".weight"

    def packed_experts(self, layer: int, which: Matrix) -> PackedExperts:
        hidden, width = self._config.hidden_size, self._config.moe.expert_intermediate
        name, form = self.expert_tensor(layer, 0, which), self.expert_form(layer)
        if form.format == "mxfp4":
            rows, inputs = (hidden, width) if which == "down" else (2 * width, hidden)
            group = FORMATS["mxfp4"].group_cols
            groups = inputs // group
            cut = _all_rows if which == "down" else partial(_rows, first=_FIRST[which])
            scale = PackedExperts(form.scale_name(name), (rows, groups), cut)
            slab = (rows, groups, group // 2)
            return PackedExperts(form.weight_name(name), slab, cut, scale=scale)
        if which == "down":
            return PackedExperts(name, (width, hidden), np.transpose)
        return PackedExperts(name, (hidden, 2 * width), partial(_columns, first=_FIRST[which]))

    def tensors_for(self, path: str) -> TensorSource:
        module, _, leaf = path.rpartition(".")
        if not module.endswith(".mlp.expert_bias"):
            return super().tensors_for(path)
        which: Matrix = "gate" if leaf == "gate" else "up" if leaf == "up" else "down"
        num_experts, size = self._specs[path].shape
        name = self.expert_tensor(int(path.split(".")[1]), 0, which) + "_bias"
        if which == "down":
            return TensorSource(
                (StoredTensor(name, (num_experts, size), FLOAT_DTYPES),), to_float32
            )
        stored = StoredTensor(name, (num_experts, 2 * size), FLOAT_DTYPES)
        first = _FIRST[which]
        return TensorSource(
            (stored,), lambda bias: np.ascontiguousarray(to_float32(bias)[:, first::2])
        )


def _columns(gate_up: np.ndarray, first: int) -> np.ndarray:
    """`[D, 2F]` to `[F, D]`: every other column, from `first` on, as a row."""
    return gate_up[:, first::2].T


def _rows(gate_up: np.ndarray, first: int) -> np.ndarray:
    """Values in groups `[2F, D/32, 16]`, or scales `[2F, D/32]`: every other row, flat."""
    return gate_up[first::2].reshape(len(gate_up) // 2, -1)


def _all_rows(down: np.ndarray) -> np.ndarray:
    return down.reshape(len(down), -1)
