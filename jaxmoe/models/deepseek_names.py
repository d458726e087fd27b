"""Tensor names of the DeepSeek family, and the split of MLA's joint up-projection.

`kv_b_proj` stores, for every head, the rows that expand the latent to a key and those that expand
it to a value. Absorbed attention applies them separately, and the key part transposed:

    kv_b [N (nope + v), C]  ->  w_uk [N, C, nope],  w_uv [N, v, C]

FP8 stays FP8 where the cut falls between scale blocks (nope and v multiples of 128, as in every
published model); otherwise both parts are dequantized to float32.
"""

from __future__ import annotations

import numpy as np

from jaxmoe.config.model_config import MlaConfig
from jaxmoe.models.names import FLOAT_DTYPES, HfNames, dequantize, to_float32
from jaxmoe.weights.name_map import StoredTensor, TensorSource
from jaxmoe.weights.param_spec import SCALE_BLOCK, WeightFormat, num_blocks

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
        name = self.weight_name(module)
        rows = attention.num_heads * (attention.nope_head_dim + attention.v_head_dim)
        shape = (rows, attention.kv_lora_rank)
        scale_shape = (num_blocks(rows), num_blocks(attention.kv_lora_rank))
        fp8 = StoredTensor(name, shape, ("F8_E4M3",))
        scale = StoredTensor(self.scale_tensor(name), scale_shape, FLOAT_DTYPES)

        def part(kv_b: np.ndarray) -> np.ndarray:
            return split_kv_b(kv_b, attention)[which]

        if leaf == "scale_inv":
            return TensorSource(
                (scale,), lambda s: split_kv_b_scale(to_float32(s), attention)[which]
            )
        dtype = self._specs[path].dtype
        if dtype == "float8_e4m3fn":
            return TensorSource((fp8,), part)
        unaligned = head_map_format(attention, "fp8_block") == "f32"
        if dtype == "float32" and self._config.quant.format == "fp8_block" and unaligned:
            return TensorSource((fp8, scale), lambda q, s: part(dequantize(q, s)))
        stored = "BF16" if dtype == "bfloat16" else "F32"
        return TensorSource((StoredTensor(name, shape, (stored,)),), part)


class IndexedNames(DeepseekNames):
    """Of DeepSeek-V3.2 and GLM-5, whose indexer is not run."""

    def ignored(self, name: str) -> bool:
        return ".self_attn.indexer." in name or super().ignored(name)


def head_map_format(attention: MlaConfig, stored: WeightFormat) -> WeightFormat:
    """How w_uk and w_uv are held, given how kv_b is stored."""
    aligned = attention.nope_head_dim % SCALE_BLOCK == 0 and attention.v_head_dim % SCALE_BLOCK == 0
    return "f32" if stored == "fp8_block" and not aligned else stored


def split_kv_b(kv_b: np.ndarray, attention: MlaConfig) -> dict[str, np.ndarray]:
    """`[N (nope + v), C]` to w_uk `[N, C, nope]` and w_uv `[N, v, C]`, both contiguous."""
    nope = attention.nope_head_dim
    heads = kv_b.reshape(attention.num_heads, nope + attention.v_head_dim, attention.kv_lora_rank)
    return {
        "w_uk": np.ascontiguousarray(heads[:, :nope].transpose(0, 2, 1)),
        "w_uv": np.ascontiguousarray(heads[:, nope:]),
    }


def split_kv_b_scale(scale: np.ndarray, attention: MlaConfig) -> dict[str, np.ndarray]:
    """The block scales, `[N (nope + v) / 128, ceil(C/128)]`, cut and transposed like the weight."""
    nope, v = attention.nope_head_dim // SCALE_BLOCK, attention.v_head_dim // SCALE_BLOCK
    heads = scale.reshape(attention.num_heads, nope + v, -1)
    return {
        "w_uk": np.ascontiguousarray(heads[:, :nope].transpose(0, 2, 1)),
        "w_uv": np.ascontiguousarray(heads[:, nope:]),
    }
