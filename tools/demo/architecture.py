"""The demo's config.json, and which Hugging Face tensor each leaf of the model is.

DeepSeek-V3's architecture at a size of about 11 MB: every width is a multiple of 128, so that each
FP8 block lies inside one head or one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from demo.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE
from jaxmoe.config.model_config import MlaConfig, ModelConfig

MAX_POSITION = 2048


def hf_config() -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": MAX_POSITION,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|eos|>"),
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json: what reads best, as measured by looking."""
    return {
        "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|eos|>"),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


_ATTENTION = {
    "q_a.data": "q_a_proj.weight",
    "q_a_norm.weight": "q_a_layernorm.weight",
    "q_b.data": "q_b_proj.weight",
    "kv_a.data": "kv_a_proj_with_mqa.weight",
    "kv_a_norm.weight": "kv_a_layernorm.weight",
    "o.data": "o_proj.weight",
}


def _plain_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(leaf, tensor) wherever one is the other unchanged."""
    yield "embedding.data", "model.embed_tokens.weight"
    yield "final_norm.weight", "model.norm.weight"
    yield "lm_head.data", "lm_head.weight"
    for i, mlp_type in enumerate(config.mlp_types):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"
        for leaf, tensor in _ATTENTION.items():
            yield f"{ours}.attention.{leaf}", f"{theirs}.self_attn.{tensor}"
        dense = (f"{ours}.mlp", f"{theirs}.mlp")
        if mlp_type == "moe":
            yield f"{ours}.mlp.router.logits.data", f"{theirs}.mlp.gate.weight"
            bias = "e_score_correction_bias"
            yield f"{ours}.mlp.router.correction_bias", f"{theirs}.mlp.gate.{bias}"
            dense = (f"{ours}.mlp.shared", f"{theirs}.mlp.shared_experts")
        for which in ("gate", "up", "down"):
            yield f"{dense[0]}.{which}.data", f"{dense[1]}.{which}_proj.weight"


def to_tensors(params: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The model's leaves and `experts.{m}.{gate,up,down}` `[E, ...]` under their shipped names."""
    tensors = {tensor: params[leaf] for leaf, tensor in _plain_names(config)}
    for i in range(config.num_layers):
        w_uk = params[f"layers.{i}.attention.w_uk.data"]  # [N, C, nope]
        w_uv = params[f"layers.{i}.attention.w_uv.data"]  # [N, v, C]
        kv_b = np.concatenate([w_uk.transpose(0, 2, 1), w_uv], axis=1)  # [N, nope + v, C]
        name = f"model.layers.{i}.self_attn.kv_b_proj.weight"
        tensors[name] = kv_b.reshape(-1, kv_b.shape[-1])
    for m, i in enumerate(config.moe_layers):
        for which in ("gate", "up", "down"):
            for e, matrix in enumerate(params[f"experts.{m}.{which}"]):
                tensors[f"model.layers.{i}.mlp.experts.{e}.{which}_proj.weight"] = matrix
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `to_tensors`."""
    attention = config.attention
    assert isinstance(attention, MlaConfig)
    params = {leaf: tensors[tensor] for leaf, tensor in _plain_names(config)}
    for i in range(config.num_layers):
        kv_b = tensors[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
        kv_b = kv_b.reshape(attention.num_heads, -1, attention.kv_lora_rank)
        nope = attention.nope_head_dim
        params[f"layers.{i}.attention.w_uk.data"] = kv_b[:, :nope].transpose(0, 2, 1)
        params[f"layers.{i}.attention.w_uv.data"] = kv_b[:, nope:]
    for m, i in enumerate(config.moe_layers):
        for which in ("gate", "up", "down"):
            experts = range(config.moe.router.num_experts)
            name = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
            stacked = np.stack([tensors[name.format(i, e, which)] for e in experts])
            params[f"experts.{m}.{which}"] = stacked
    return params
