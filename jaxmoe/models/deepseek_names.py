"""Tensor names of the DeepSeek family, and the split of MLA's joint up-projection.

`kv_b_proj` stores, for every head, the rows that expand the latent to a key and those that expand
it to a value. Absorbed attention applies them separately, and the key part transposed:

    kv_b [N (nope + v), C]  ->  w_uk [N, C, nope],  w_uv [N, v, C]

FP8 in blocks stays so where the cut falls between blocks (nope and v multiples of 128, as in most
published models). Where it does not, both parts are dequantized to float32; where scales belong to
rows or to groups of them, only w_uk is, since turning it would leave them none.
"""

from __future__ import annotations

import numpy as np

from jaxmoe.config.model_config import MlaConfig
from jaxmoe.models.names import HfNames
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.formats import SCALE_BLOCK, WeightFormat, data_shape, scale_shape
from jaxmoe.weights.name_map import TensorSource

_KV_B = "self_attn.kv_b_proj"


class DeepseekNames(HfNames):
    modules = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.q_a": "self_attn.q_a_proj",
        "attention.q_a_norm": "self_attn.q_a_layernorm",
        "attention.q_b": "self_attn.q_b_proj",
        "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_a_norm": "self_attn.kv_a_layernorm",
        "attention.w_uk": _KV_B,
        "attention.w_uv": _KV_B,
        "attention.o": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "mlp.router.logits": "mlp.gate",
        "mlp.shared.gate": "mlp.shared_experts.gate_proj",
        "mlp.shared.up": "mlp.shared_experts.up_proj",
        "mlp.shared.down": "mlp.shared_experts.down_proj",
    }
    leaves = {"mlp.router.correction_bias": "mlp.gate.e_score_correction_bias"}

    def tensors_for(self, path: str) -> TensorSource:
        module, _, leaf = path.rpartition(".")
        which = module.rpartition(".")[2]
        if which not in ("w_uk", "w_uv"):
            return super().tensors_for(path)
        attention = self._config.attention
        assert isinstance(attention, MlaConfig)
        name, form = self.weight_name(module), self.form(module)
        rows = attention.num_heads * (attention.nope_head_dim + attention.v_head_dim)
        inputs = attention.kv_lora_rank
        weight = form.weight_tensor(name, data_shape(form.format, rows, inputs))
        scales = scale_shape(form.format, rows, inputs)
        stored_scales = () if scales is None else form.scale_tensors(name, scales)

        def part(kv_b: np.ndarray) -> np.ndarray:
            return split_kv_b(kv_b, attention)[which]

        if leaf == "scale_inv":
            return TensorSource(
                stored_scales, lambda *s: split_kv_b_scale(form.hold_scale(*s), attention)[which]
            )
        others = form.others(name)
        if not stored_scales or head_map_format(attention, form.format, which) == form.format:
            return TensorSource((weight,), lambda q: part(form.hold_weight(q)), others)

        def plain(q: np.ndarray, *s: np.ndarray) -> np.ndarray:
            return part(dequantize(form.format, form.hold_weight(q), form.hold_scale(*s)))

        return TensorSource((weight, *stored_scales), plain, others)


class IndexedNames(DeepseekNames):
    """Of DeepSeek-V3.2 and GLM-5, whose attention has an indexer."""

    modules = {
        **DeepseekNames.modules,
        "attention.indexer.q": "self_attn.indexer.wq_b",
        "attention.indexer.k": "self_attn.indexer.wk",
        "attention.indexer.k_norm": "self_attn.indexer.k_norm",
        "attention.indexer.head_weights": "self_attn.indexer.weights_proj",
    }

    def ignored(self, name: str) -> bool:
        """Also the indexers of layers that use another's choice, should there be any."""
        attention = self._config.attention
        assert isinstance(attention, MlaConfig) and attention.indexer is not None
        unused = (self._in_layer(i, "self_attn.indexer.") for i in attention.indexer.sharing_layers)
        return name.startswith(tuple(unused)) or super().ignored(name)


def head_map_format(attention: MlaConfig, stored: WeightFormat, which: str) -> WeightFormat:
    """How w_uk or w_uv is held, given how kv_b is stored: as it is, or dequantized to float32
    where the cut, or w_uk's turn, leaves the scales without rows and columns to belong to.
    """
    aligned = attention.nope_head_dim % SCALE_BLOCK == 0 and attention.v_head_dim % SCALE_BLOCK == 0
    if stored in ("bf16", "f32") or (stored == "fp8_block" and aligned):
        return stored
    return stored if stored != "fp8_block" and which == "w_uv" else "f32"


def split_kv_b(kv_b: np.ndarray, attention: MlaConfig) -> dict[str, np.ndarray]:
    """`[N (nope + v), C]` to w_uk `[N, C, nope]` and w_uv `[N, v, C]`, both contiguous."""
    nope = attention.nope_head_dim
    heads = kv_b.reshape(attention.num_heads, nope + attention.v_head_dim, -1)
    return {
        "w_uk": np.ascontiguousarray(heads[:, :nope].transpose(0, 2, 1)),
        "w_uv": np.ascontiguousarray(heads[:, nope:]),
    }


def split_kv_b_scale(scale: np.ndarray, attention: MlaConfig) -> dict[str, np.ndarray]:
    """The scales, a row for every row of the weight or for 128 of them, cut and turned like it."""
    nope, v = attention.nope_head_dim, attention.v_head_dim
    if len(scale) != attention.num_heads * (nope + v):
        nope, v = nope // SCALE_BLOCK, v // SCALE_BLOCK
    heads = scale.reshape(attention.num_heads, nope + v, -1)
    return {
        "w_uk": np.ascontiguousarray(heads[:, :nope].transpose(0, 2, 1)),
        "w_uv": np.ascontiguousarray(heads[:, nope:]),
    }
