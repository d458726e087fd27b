"""Leaf paths to Hugging Face tensor names: the part all families share.

A family gives a table from module paths within a layer to tensor names within a layer; a module
whose weights are not stored as they are used (MLA's up-projections) overrides `tensors_for`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights.name_map import Matrix, PackedExperts, StoredTensor, TensorSource
from jaxmoe.weights.param_spec import SCALE_BLOCK, ParamSpec

_LAYER_PATH = re.compile(r"layers\.(\d+)\.(.+)")
_LAYER_TENSOR = re.compile(r"layers\.(\d+)\.")
_OF_TRUNK = {"embedding": "embed_tokens", "final_norm": "norm"}
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
# What small tensors may be stored as: they are held in float32, and both widen to it exactly.
FLOAT_DTYPES = ("F32", "BF16")


class HfNames:
    """The `NameMap` of a family; `specs` may be empty where only `weight_name` is asked."""

    # Module path within a layer -> module name within "model.layers.{i}.".
    modules: Mapping[str, str]
    # Leaves that are not called ".weight", likewise.
    leaves: Mapping[str, str] = {}
    expert = "mlp.experts.{expert}.{which}"
    expert_matrices: Mapping[Matrix, str] = {
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    }
    # Before every name, where the language model is a part of a larger one; the tensors of the
    # other parts start with `other_parts`.
    prefix = ""
    # Before the names of everything but the output head.
    trunk = "model."
    other_parts: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, specs: Mapping[str, ParamSpec]):
        self._config = config
        self._specs = specs

    def module_name(self, path: str) -> str:
        """The name of a module: "layers.3.attention.o" -> "model.layers.3.self_attn.o_proj"."""
        if path == "lm_head":
            return self.prefix + path
        if path in _OF_TRUNK:
            return self.prefix + self.trunk + _OF_TRUNK[path]
        match = _LAYER_PATH.fullmatch(path)
        assert match, path
        layer, module = int(match[1]), match[2]
        if module == "mlp.experts":
            return self.expert_tensor(layer, 0, "gate").removesuffix(".weight")
        return self._in_layer(layer, self.modules[module])

    def _in_layer(self, layer: int | str, name: str) -> str:
        return f"{self.prefix}{self.trunk}layers.{layer}.{name}"

    def weight_name(self, path: str) -> str:
        """The weight of the module at a path; of routed experts, their first one's."""
        return self.module_name(path) + ".weight"

    def tensors_for(self, path: str) -> TensorSource:
        spec = self._specs[path]
        module, _, leaf = path.rpartition(".")
        match = _LAYER_PATH.fullmatch(path)
        if match and match[2] in self.leaves:
            name = self._in_layer(match[1], self.leaves[match[2]])
        elif leaf == "bias":
            name = self.module_name(module) + ".bias"
        elif leaf == "scale_inv":
            name = self.scale_tensor(self.weight_name(module))
        else:
            name = self.weight_name(module)
        if spec.kind in ("matrix", "head_map", "embedding"):
            dtypes = (_SAFETENSORS_DTYPE[spec.dtype],)
            return TensorSource((StoredTensor(name, spec.shape, dtypes),), _as_stored)
        return TensorSource((StoredTensor(name, spec.shape, FLOAT_DTYPES),), to_float32)

    def expert_tensor(self, layer: int, expert: int, which: Matrix) -> str:
        name = self.expert.format(expert=expert, which=self.expert_matrices[which])
        return self._in_layer(layer, name) + ".weight"

    def packed_experts(self, layer: int, which: Matrix) -> PackedExperts | None:
        return None

    def scale_tensor(self, weight: str) -> str:
        return weight + "_scale_inv"

    def ignored(self, name: str) -> bool:
        """As many layers after the last as config.json says are multi-token-prediction heads.

        Others are not: a config that names too few layers would run, and write nonsense.
        """
        config = self._config
        if not name.startswith(self.prefix) or name.startswith(self.other_parts):
            return name.startswith(self.other_parts)
        name = name.removeprefix(self.prefix)
        match = _LAYER_TENSOR.match(name.removeprefix(self.trunk))
        if match and 0 <= int(match[1]) - config.num_layers < config.num_draft_layers:
            return True
        if name.endswith("rotary_emb.inv_freq"):
            return True
        return config.tie_embeddings and name == "lm_head.weight"


def _as_stored(array: np.ndarray) -> np.ndarray:
    return array


def to_float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def dequantize(data: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """FP8 `[N, K]` and its block scales `[ceil(N/128), ceil(K/128)]` to float32."""
    assert data.dtype == ml_dtypes.float8_e4m3fn
    n, k = data.shape
    scale = np.asarray(scale_inv, np.float32)
    scale = scale.repeat(SCALE_BLOCK, axis=0)[:n].repeat(SCALE_BLOCK, axis=1)[:, :k]
    return data.astype(np.float32) * scale
