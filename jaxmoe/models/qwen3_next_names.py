"""Tensor names of Qwen3-Next and of Qwen3.5's text model, and the cut of the latter's packed
experts.

Qwen3.5 has its BF16 experts in one tensor a layer, gate rows before up rows: gate_up_proj
`[E, 2F, D]`, down_proj `[E, D, F]`. Its FP8 checkpoints have a tensor an expert, as Qwen3-Next has.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np

from jaxmoe.models.names import to_float32
from jaxmoe.models.qwen3_moe_names import Qwen3MoeNames
from jaxmoe.weights.name_map import Matrix, PackedExperts, TensorSource

_TENSOR: dict[Matrix, str] = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


class Qwen3NextNames(Qwen3MoeNames):
    modules = {
        **Qwen3MoeNames.modules,
        "attention.qkvz": "linear_attn.in_proj_qkvz",
        "attention.ba": "linear_attn.in_proj_ba",
        "attention.norm": "linear_attn.norm",
        "attention.out": "linear_attn.out_proj",
        "mlp.shared.gate": "mlp.shared_expert.gate_proj",
        "mlp.shared.up": "mlp.shared_expert.up_proj",
        "mlp.shared.down": "mlp.shared_expert.down_proj",
        "mlp.shared_gate": "mlp.shared_expert_gate",
    }
    leaves = {
        "attention.conv": "linear_attn.conv1d.weight",
        "attention.a_log": "linear_attn.A_log",
        "attention.dt_bias": "linear_attn.dt_bias",
    }
    other_parts = ("mtp.",)

    def tensors_for(self, path: str) -> TensorSource:
        if not path.endswith(".attention.conv"):
            return super().tensors_for(path)
        width, channels = self._specs[path].shape
        (tensor,) = super().tensors_for(path).tensors
        stored = dataclasses.replace(tensor, shape=(channels, 1, width))
        return TensorSource((stored,), lambda conv: np.ascontiguousarray(to_float32(conv)[:, 0].T))


class Qwen35MoeNames(Qwen3NextNames):
    modules = {
        **Qwen3NextNames.modules,
        "attention.qkv": "linear_attn.in_proj_qkv",
        "attention.z": "linear_attn.in_proj_z",
        "attention.b": "linear_attn.in_proj_b",
        "attention.a": "linear_attn.in_proj_a",
    }
    trunk = "model.language_model."
    other_parts = ("mtp.", "model.visual.")

    @property
    def _is_packed(self) -> bool:
        return self._config.quant.format == "none"

    def expert_tensor(self, layer: int, expert: int, which: Matrix) -> str:
        if self._is_packed:
            return self._in_layer(layer, f"mlp.experts.{_TENSOR[which]}")
        return super().expert_tensor(layer, expert, which)

    def weight_name(self, path: str) -> str:
        name = self.module_name(path)
        return name if self._is_packed and path.endswith(".mlp.experts") else name + ".weight"

    def packed_experts(self, layer: int, which: Matrix) -> PackedExperts | None:
        if not self._is_packed:
            return None
        hidden, width = self._config.hidden_size, self._config.moe.expert_intermediate
        name = self.expert_tensor(layer, 0, which)
        if which == "down":
            return PackedExperts(
                name, (hidden, width), partial(_rows, first=0, count=hidden), first_row=0
            )
        first = 0 if which == "gate" else width
        cut = partial(_rows, first=first, count=width)
        return PackedExperts(name, (2 * width, hidden), cut, first_row=first)


def _rows(slab: np.ndarray, first: int, count: int) -> np.ndarray:
    return slab[first : first + count]
