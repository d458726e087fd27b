"""Leaf paths to Hugging Face tensor names: the part all families share.

A family gives a table from module paths within a layer to tensor names within a layer; a module
whose weights are not stored as they are used (MLA's up-projections) overrides `tensors_for`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models.stored_forms import weight_of_scale
from jaxmoe.weights.model_registry import experts_path
from jaxmoe.weights.name_map import Matrix, PackedExperts, StoredTensor, TensorSource
from jaxmoe.weights.param_spec import ParamSpec
from jaxmoe.weights.stored_form import Forms, StoredForm

_LAYER_PATH = re.compile(r"layers\.(\d+)\.(.+)")
_LAYER_TENSOR = re.compile(r"layers\.(\d+)\.")
_OF_TRUNK = {"embedding": "embed_tokens", "final_norm": "norm"}
_OF_DRAFT = {
    "draft.embedding_norm": "enorm",
    "draft.hidden_norm": "hnorm",
    "draft.join": "eh_proj",
    "draft.norm": "shared_head.norm",
}
# Copies of the model's own, which are used in their place.
_OF_DRAFT_UNUSED = ("embed_tokens.weight", "shared_head.head.weight")
# Scales of a KV cache that is rounded to 8 bits; ours is not.
_OF_ROUNDED_CACHES = (".k_scale", ".v_scale")
# What small tensors may be stored as: they are held in float32, and both widen to it exactly.
FLOAT_DTYPES = ("F32", "BF16")


class HfNames:
    """The `NameMap` of a family; `specs` may be empty, and `forms` absent, where only `weight_name`
    is asked.
    """

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

    def __init__(
        self, config: ModelConfig, specs: Mapping[str, ParamSpec], forms: Forms | None = None
    ):
        self._config = config
        self._specs = specs
        self._forms = forms

    @classmethod
    def of(cls, tensors: Collection[str]) -> type[HfNames]:
        """The map for a checkpoint with tensors of these names: families may have layouts."""
        return cls

    def module_name(self, path: str) -> str:
        """The name of a module: "layers.3.attention.o" -> "model.layers.3.self_attn.o_proj"."""
        if path == "lm_head":
            return self.prefix + path
        if path in _OF_TRUNK:
            return self.prefix + self.trunk + _OF_TRUNK[path]
        if path in _OF_DRAFT:
            return self._in_layer(self._config.num_layers, _OF_DRAFT[path])
        match = _LAYER_PATH.fullmatch(path)
        assert match, path
        layer, module = int(match[1]), match[2]
        if module == "mlp.experts":
            return self.expert_tensor(layer, 0, "gate").removesuffix(".weight")
        return self._in_layer(layer, self.modules[module])

    def _in_layer(self, layer: int | str, name: str) -> str:
        return f"{self.prefix}{self.trunk}layers.{layer}.{name}"

    def weight_name(self, path: str) -> str:
        """The weight of the module at a path, as it is called where it is not quantized; of routed
        experts, their first one's.
        """
        return self.module_name(path) + ".weight"

    def tensors_for(self, path: str) -> TensorSource:
        spec = self._specs[path]
        module, _, leaf = path.rpartition(".")
        match = _LAYER_PATH.fullmatch(path)
        if match and match[2] in self.leaves:
            name = self._in_layer(match[1], self.leaves[match[2]])
        elif leaf == "bias":
            name = self.module_name(module) + ".bias"
        else:
            name = self.weight_name(module)
            if spec.kind in ("matrix", "head_map", "embedding", "scale_inv"):
                form = self.form(module)
                if leaf == "scale_inv":
                    return TensorSource(form.scale_tensors(name, spec.shape), form.hold_scale)
                tensor = form.weight_tensor(name, spec.shape)
                return TensorSource((tensor,), form.hold_weight, form.others(name))
        return TensorSource((StoredTensor(name, spec.shape, FLOAT_DTYPES),), to_float32)

    def form(self, path: str) -> StoredForm:
        """How the linear map at a path is stored."""
        assert self._forms is not None
        return self._forms.stored(path)

    def expert_tensor(self, layer: int, expert: int, which: Matrix) -> str:
        name = self.expert.format(expert=expert, which=self.expert_matrices[which])
        return self._in_layer(layer, name) + ".weight"

    def expert_form(self, layer: int) -> StoredForm:
        return self.form(experts_path(layer))

    def packed_experts(self, layer: int, which: Matrix) -> PackedExperts | None:
        return None

    def weight_of_scale(self, name: str) -> str | None:
        return weight_of_scale(name)

    def ignored(self, name: str) -> bool:
        """As many layers after the last as config.json says are multi-token-prediction heads.

        Others are not: a config that names too few layers would run, and write nonsense.
        """
        config = self._config
        if not name.startswith(self.prefix) or name.startswith(self.other_parts):
            return name.startswith(self.other_parts)
        name = name.removeprefix(self.prefix)
        match = _LAYER_TENSOR.match(name.removeprefix(self.trunk))
        draft = int(match[1]) - config.num_layers if match else -1
        if config.runs_draft and draft == 0:
            return name.endswith(_OF_DRAFT_UNUSED)
        if 0 <= draft < config.num_draft_layers:
            return True
        if name.endswith(("rotary_emb.inv_freq", *_OF_ROUNDED_CACHES)):
            return True
        return config.tie_embeddings and name == "lm_head.weight"


def to_float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)
