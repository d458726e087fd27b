"""Tensor names of DeepSeek-V4: as shipped, which follow its own code, and as transformers saves
them.

The maps of the output's groups are rows of one matrix, `wo_a [G O, N H / G]`; the table of experts
of hashed layers, `tid2eid [V, A]`, is int64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import CompressedConfig
from jaxmoe.models.names import HfNames, to_float32
from jaxmoe.quant.formats import FORMATS, data_shape, scale_shape
from jaxmoe.weights.name_map import StoredTensor, TensorSource

_OF_TRUNK = {"embedding": "embed", "final_norm": "norm", "lm_head": "head"}
_SAVED_EMBEDDING = "model.embed_tokens.weight"
_SMALL = ("F32",)  # what sinks, biases and the streams' weights are shipped in
_STREAMS_HEAD = "streams_head."
_COMPRESSOR = {"kv": "wkv", "gate": "wgate", "norm": "norm"}


class DeepseekV4Names(HfNames):
    trunk = ""
    of_trunk = _OF_TRUNK
    streams_head = "hc_head_"
    modules = {
        "attention_norm": "attn_norm",
        "mlp_norm": "ffn_norm",
        "attention.q_a": "attn.wq_a",
        "attention.q_a_norm": "attn.q_norm",
        "attention.q_b": "attn.wq_b",
        "attention.kv": "attn.wkv",
        "attention.kv_norm": "attn.kv_norm",
        "attention.o_a": "attn.wo_a",
        "attention.o_b": "attn.wo_b",
        "attention.indexer.q": "attn.indexer.wq_b",
        "attention.indexer.head_weights": "attn.indexer.weights_proj",
        **{f"attention.compressor.{a}": f"attn.compressor.{b}" for a, b in _COMPRESSOR.items()},
        **{
            f"attention.indexer.compressor.{a}": f"attn.indexer.compressor.{b}"
            for a, b in _COMPRESSOR.items()
        },
        "attention_streams.fn": "hc_attn_fn",
        "mlp_streams.fn": "hc_ffn_fn",
        "mlp.router.logits": "ffn.gate",
        "mlp.shared.gate": "ffn.shared_experts.w1",
        "mlp.shared.up": "ffn.shared_experts.w3",
        "mlp.shared.down": "ffn.shared_experts.w2",
    }
    leaves = {
        "attention.sinks": "attn.attn_sink",
        "attention.compressor.position_bias": "attn.compressor.ape",
        "attention.indexer.compressor.position_bias": "attn.indexer.compressor.ape",
        "attention_streams.base": "hc_attn_base",
        "attention_streams.scale": "hc_attn_scale",
        "mlp_streams.base": "hc_ffn_base",
        "mlp_streams.scale": "hc_ffn_scale",
        "mlp.router.correction_bias": "ffn.gate.bias",
    }
    expert = "ffn.experts.{expert}.{which}"
    expert_matrices = {"gate": "w1", "up": "w3", "down": "w2"}

    @classmethod
    def of(cls, tensors: Collection[str]) -> type[HfNames]:
        return SavedDeepseekV4Names if _SAVED_EMBEDDING in tensors else cls

    def module_name(self, path: str) -> str:
        if path.startswith(_STREAMS_HEAD):
            return self.streams_head + path.removeprefix(_STREAMS_HEAD)
        return self.of_trunk.get(path) or super().module_name(path)

    def weight_name(self, path: str) -> str:
        name = self.module_name(path)
        return name if path.endswith(".fn") else name + ".weight"

    def tensors_for(self, path: str) -> TensorSource:
        spec = self._specs[path]
        if path in (f"{_STREAMS_HEAD}base", f"{_STREAMS_HEAD}scale"):
            name = self.module_name(path)
            return TensorSource((StoredTensor(name, spec.shape, _SMALL),), to_float32)
        layer_leaf = path.partition(".")[2].partition(".")[2]
        if layer_leaf in self.leaves:
            name = self._in_layer(path.split(".")[1], self.leaves[layer_leaf])
            return TensorSource((StoredTensor(name, spec.shape, _SMALL),), to_float32)
        if spec.kind == "expert_table":
            layer = path.split(".")[1]
            name = self._in_layer(layer, "ffn.gate.tid2eid")
            return TensorSource(
                (StoredTensor(name, spec.shape, ("I64", "I32")),), self._table(name)
            )
        module, _, leaf = path.rpartition(".")
        if not module.endswith("attention.o_a"):
            return super().tensors_for(path)
        attention = self._config.attention
        assert isinstance(attention, CompressedConfig)
        groups, rank, row = attention.o_groups, attention.o_rank, attention.num_heads
        row = row * attention.head_dim // groups
        name, form = self.weight_name(module), self.form(module)
        if rank % FORMATS[form.format].group_rows:
            raise CheckpointError(
                f"tensor '{name}' is stored as {form.format}, whose scales belong to rows of two "
                f"groups of {rank}; supported: BF16, F32, or a rank that blocks divide"
            )
        if leaf == "scale_inv":
            scales = scale_shape(form.format, groups * rank, row)
            assert scales is not None
            tensor = form.scale_tensor(name, scales)
            return TensorSource((tensor,), lambda s: form.hold_scale(s).reshape(spec.shape))
        tensor = form.weight_tensor(name, data_shape(form.format, groups * rank, row))
        others = form.others(name)
        return TensorSource((tensor,), lambda w: form.hold_weight(w).reshape(spec.shape), others)

    def _table(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        num_experts = self._config.moe.router.num_experts

        def checked(table: np.ndarray) -> np.ndarray:
            if table.size and not (0 <= table.min() and table.max() < num_experts):
                raise CheckpointError(
                    f"tensor '{name}' names experts {table.min()} to {table.max()}; the model has "
                    f"0 to {num_experts - 1}"
                )
            return table.astype(np.int32)

        return checked

    def ignored(self, name: str) -> bool:
        """Also the draft heads, as many as config.json says."""
        drafts = (f"mtp.{i}." for i in range(self._config.num_draft_layers))
        return name.startswith(tuple(drafts)) or super().ignored(name)


class SavedDeepseekV4Names(DeepseekV4Names):
    """As `save_pretrained` of transformers 5.17 to 5.24 writes them: no draft heads, and names that
    are half its own.
    """

    trunk = "model."
    of_trunk = {**_OF_TRUNK, "embedding": "model.embed_tokens", "final_norm": "model.norm"}
    streams_head = "model.hc_head.hc_"
    modules = {**DeepseekV4Names.modules, "attention.kv_norm": "attn.norm"}
