"""config.json of the families beyond DeepSeek and Qwen3: as published, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
from support import tiny_models

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.model_config import (
    ClampedSwiglu,
    GatedDeltaConfig,
    GqaConfig,
    IndexerConfig,
    MlaConfig,
    ModelConfig,
)
from jaxmoe.layers.rope import attention_factor

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 50304,
}
GLM_45: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
GLM_FLASH = tiny_models.hf_config("glm4_moe_lite") | {
    "hidden_size": 2048,
    "num_attention_heads": 20,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
}
MINIMAX = tiny_models.hf_config("minimax_m2_fp8") | {
    "attn_type_list": [1] * 62,
    "hidden_size": 3072,
    "num_attention_heads": 48,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
}
GPT_OSS_20B = tiny_models.hf_config("gpt_oss") | {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "sliding_window": 128,
}
DEEPSEEK_V32 = tiny_models.hf_config("deepseek_v32_fp8") | {"index_topk": 2048}
GLM_5 = tiny_models.hf_config("glm_moe_dsa") | {"index_topk": 2048}
KIMI_K25 = tiny_models.hf_config("kimi_k25")
QWEN3_NEXT = tiny_models.hf_config("qwen3_next") | {
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
}
QWEN35 = tiny_models.hf_config("qwen3_5_moe")
BASES = {
    "next": QWEN3_NEXT,
    "qwen35": QWEN35,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "glm": GLM_45,
    "flash": GLM_FLASH,
    "minimax": MINIMAX,
    "kimi": KIMI_K25,
    "v32": DEEPSEEK_V32,
    "glm5": GLM_5,
    "gpt_oss": GPT_OSS_20B,
}


@pytest.fixture(autouse=True)
def every_key_is_understood(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        yield
    assert not caplog.records


def test_mixtral():
    config = ModelConfig.from_hf(MIXTRAL)
    assert config.attention == GqaConfig(32, 8, 128, 128**-0.5, "none")
    assert config.rope.dim == 128 and config.rope.theta == 1e6
    assert config.moe_layers == tuple(range(32))
    assert config.moe.router.renormalize and config.moe.router.score == "softmax"
    assert config.moe.expert_intermediate == 14336


def test_olmoe():
    config = ModelConfig.from_hf(OLMOE)
    assert config.attention == GqaConfig(16, 16, 128, 128**-0.5, "row")
    assert not config.moe.router.renormalize
    clipped = ModelConfig.from_hf(OLMOE | {"clip_qkv": 8.0}).attention
    assert isinstance(clipped, GqaConfig) and clipped.qkv_clip == 8.0


def test_glm_45_and_air():
    config = ModelConfig.from_hf(GLM_45)
    assert config.attention == GqaConfig(96, 8, 128, 128**-0.5, "head", qkv_bias=True)
    assert config.rope.dim == 64 and not config.rope.interleaved
    router = config.moe.router
    assert (router.score, router.num_groups, router.correction_bias) == ("sigmoid", 1, True)
    assert config.moe_layers == tuple(range(3, 92)) and config.num_draft_layers == 1
    assert config.eos_token_ids == (151329, 151336, 151338)
    air = GLM_45 | {"use_qk_norm": False, "first_k_dense_replace": 1, "hidden_size": 4096}
    config = ModelConfig.from_hf(air)
    assert isinstance(config.attention, GqaConfig) and config.attention.qk_norm == "none"


def test_partial_rotation_in_either_place():
    new = {k: v for k, v in GLM_45.items() if not k.startswith(("rope", "partial"))}
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert ModelConfig.from_hf(new | {"rope_parameters": rope}).rope.dim == 32
    del rope["partial_rotary_factor"]
    assert ModelConfig.from_hf(new | {"rope_parameters": rope}) == ModelConfig.from_hf(GLM_45)


def test_glm_flash():
    config = ModelConfig.from_hf(GLM_FLASH)
    assert config.attention == MlaConfig(20, 768, 512, 192, 64, 256, 256**-0.5)
    assert config.rope.interleaved and config.moe.router.weight_scale == 1.8
    listed = {k: v for k, v in GLM_FLASH.items() if k != "first_k_dense_replace"}
    listed["mlp_layer_types"] = ["dense"] + ["sparse"] * 46
    assert ModelConfig.from_hf(listed) == config


def test_minimax():
    config = ModelConfig.from_hf(MINIMAX)
    assert config.attention == GqaConfig(48, 8, 128, 128**-0.5, "row")
    assert config.rope.dim == 64 and config.rope.theta == 5e6
    router = config.moe.router
    assert router.correction_bias and router.renormalize and router.float32_weights
    assert router.weight_scale == 1.0
    assert config.quant.format == "fp8_block" and config.moe_layers == tuple(range(62))
    assert config.eos_token_ids == ()  # generation_config.json has them


def test_kimi_k25_is_its_text_model():
    config = ModelConfig.from_hf(KIMI_K25)
    assert config.architecture == "KimiK25ForConditionalGeneration"
    text = ModelConfig.from_hf(tiny_models.hf_config("kimi_k2"))
    assert config.moe == text.moe
    assert isinstance(config.attention, MlaConfig) and config.attention.q_lora_rank == 192
    assert config.rope.scaling is not None and config.rope.scaling.factor == 64
    assert (config.bos_token_id, config.eos_token_ids) == (510, (511,))
    inner = KIMI_K25["text_config"] | {"eos_token_id": 7}
    only_inner = {k: v for k, v in KIMI_K25.items() if k != "eos_token_id"}
    assert ModelConfig.from_hf(only_inner | {"text_config": inner}).eos_token_ids == (7,)


def test_gpt_oss():
    config = ModelConfig.from_hf(GPT_OSS_20B)
    assert config.attention == GqaConfig(
        64, 8, 64, 64**-0.5, "none", qkv_bias=True, o_bias=True, sinks=True
    )
    assert config.windows == (128, None) * 12
    assert config.moe.activation == ClampedSwiglu(1.702, 7.0) and config.moe.expert_bias
    assert config.moe.router.logit_bias and config.moe.router.renormalize
    scaling = config.rope.scaling
    assert scaling is not None and not scaling.truncate and scaling.factor == 32
    assert attention_factor(config.rope) == pytest.approx(1.3465735902799727)
    without = {k: v for k, v in GPT_OSS_20B.items() if k != "layer_types"}
    assert ModelConfig.from_hf(without) == config


def test_gpt_oss_as_published():
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]}
    quant = ModelConfig.from_hf(GPT_OSS_20B | {"quantization_config": quantization}).quant
    assert (quant.format, quant.only_experts) == ("mxfp4", True)


def test_sparse_models_are_dense_ones_with_an_indexer():
    config = ModelConfig.from_hf(DEEPSEEK_V32)
    assert config.max_position == 163840
    dense = {k: v for k, v in DEEPSEEK_V32.items() if not k.startswith("index_")}
    dense |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    v3 = ModelConfig.from_hf(dense)
    assert isinstance(config.attention, MlaConfig) and config.rope.interleaved
    indexer = config.attention.indexer
    assert indexer == IndexerConfig(
        4, 128, 2048, dataclasses.replace(config.rope, interleaved=False)
    )
    alike = dataclasses.replace(config.attention, indexer=None)
    assert (alike, config.rope, config.moe) == (v3.attention, v3.rope, v3.moe)
    glm = ModelConfig.from_hf(GLM_5 | {"layer_types": ["deepseek_sparse_attention"] * 3})
    assert isinstance(glm.attention, MlaConfig) and glm.max_position == 202752
    assert glm.attention.indexer == IndexerConfig(4, 128, 2048, glm.rope)


@pytest.mark.parametrize(
    ("sharing", "layers"),
    [
        ({"indexer_types": ["full", "shared", "shared"]}, (1, 2)),
        ({"index_topk_pattern": "FSF"}, (1,)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 2}, (2,)),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, (1,)),
        ({"indexer_types": ["full"] * 3, "index_topk_freq": 4}, ()),
        ({"index_topk_pattern": ["full", "full", "shared"]}, (2,)),
        ({"index_topk_freq": 1, "index_skip_topk_offset": 3}, ()),
    ],
)
def test_layers_that_use_anothers_choice(sharing, layers):
    config = ModelConfig.from_hf(GLM_5 | sharing)
    assert isinstance(config.attention, MlaConfig) and config.attention.indexer is not None
    assert config.attention.indexer.sharing_layers == layers


def test_qwen3_next():
    config = ModelConfig.from_hf(QWEN3_NEXT)
    assert config.attention == GqaConfig(16, 2, 256, 1 / 16, "head", output_gate=True)
    assert config.linear_attention == GatedDeltaConfig(16, 32, 128, 128, 4, True)
    assert config.linear_attention.conv_channels == 8192
    assert config.linear_layers == tuple(i for i in range(48) if i % 4 != 3)
    assert config.rope.dim == 64 and config.rope.theta == 1e7 and not config.rope.interleaved
    assert config.norm_offset == 1.0
    moe = config.moe
    assert (moe.shared_intermediate, moe.shared_gate, moe.router.renormalize) == (512, True, True)
    assert config.moe_layers == tuple(range(48))
    by_layer = QWEN3_NEXT | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}
    del by_layer["full_attention_interval"]
    assert ModelConfig.from_hf(by_layer) == config
    some_dense = ModelConfig.from_hf(QWEN3_NEXT | {"mlp_only_layers": [5]})
    assert some_dense.mlp_types[5] == "dense" and some_dense.dense_intermediate == 5120


def test_qwen35_is_its_text_model():
    config = ModelConfig.from_hf(QWEN35)
    assert config.architecture == "Qwen3_5MoeForConditionalGeneration"
    assert config.linear_attention == GatedDeltaConfig(2, 4, 128, 128, 4, False)
    assert config.linear_layers == (0, 1, 2) and config.rope.dim == 64
    assert config.moe.router.renormalize and config.eos_token_ids == (511,)
    assert ModelConfig.from_hf(QWEN35 | {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert ModelConfig.from_hf(QWEN35 | {"tie_word_embeddings": True}).tie_embeddings
    quantized = tiny_models.hf_config("qwen3_5_moe_fp8")
    assert ModelConfig.from_hf(quantized).quant.format == "fp8_block"
    quant = quantized.pop("quantization_config")
    inside = quantized | {"text_config": quantized["text_config"] | {"quantization_config": quant}}
    assert ModelConfig.from_hf(inside).quant.format == "fp8_block"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    rope = QWEN35["text_config"]["rope_parameters"] | yarn
    extended = ModelConfig.from_hf(qwen35_text(rope_parameters=rope, max_position_embeddings=2**20))
    assert extended.rope.scaling is not None and extended.rope.dim == 64


def qwen35_text(**changes: Any) -> dict[str, Any]:
    return QWEN35 | {"text_config": QWEN35["text_config"] | changes}


def text_of(**changes: Any) -> dict[str, Any]:
    return {"text_config": KIMI_K25["text_config"] | changes}


REFUSED = [
    ("mixtral", {"sliding_window": 4096}, ["sliding_window", "4096"]),
    ("mixtral", {"hidden_act": "gelu"}, ["hidden_act", "silu"]),
    ("mixtral", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "8"]),
    ("mixtral", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "1.0"]),
    ("olmoe", {"attention_bias": True}, ["attention_bias"]),
    ("olmoe", {"clip_qkv": -1.0}, ["clip_qkv", "above 0"]),
    ("glm", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "at most 1.0"]),
    ("glm", {"partial_rotary_factor": 0.01}, ["even number"]),
    ("glm", {"routed_scaling_factor": None}, ["lacks 'routed_scaling_factor'"]),
    (
        "glm",
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        ["lacks 'config_groups'"],
    ),
    ("flash", {"attention_bias": True}, ["attention_bias"]),
    ("flash", {"mlp_layer_types": ["dense"]}, ["mlp_layer_types", "47"]),
    ("flash", {"index_topk": 2048}, ["index_topk"]),
    ("minimax", {"attn_type_list": [0] + [1] * 61}, ["attn_type_list", "full attention"]),
    ("minimax", {"rotary_dim": 129}, ["rotary_dim", "128"]),
    ("minimax", {"rotary_dim": 63}, ["even number"]),
    ("minimax", {"qk_norm_type": "per_head"}, ["qk_norm_type", "per_layer"]),
    ("minimax", {"use_routing_bias": False}, ["use_routing_bias"]),
    ("minimax", {"shared_intermediate_size": 64}, ["shared_intermediate_size"]),
    ("minimax", {"scoring_func": "softmax"}, ["scoring_func"]),
    ("gpt_oss", {"quantization_config": {"quant_method": "quark"}}, ["quark", "mxfp4"]),
    ("gpt_oss", {"attention_bias": False}, ["attention_bias", "True"]),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 24}, ["layer_types", "chunked"]),
    ("gpt_oss", {"layer_types": ["full_attention"] * 23}, ["layer_types", "24"]),
    ("gpt_oss", {"swiglu_limit": 0}, ["swiglu_limit", "above 0"]),
    ("v32", {"index_topk": None}, ["lacks 'index_topk'"]),
    ("v32", {"layer_types": ["linear_attention"]}, ["layer_types", "linear_attention"]),
    ("v32", {"index_head_dim": 32}, ["index_head_dim", "at least 64"]),
    ("v32", {"index_n_heads": None}, ["lacks 'index_n_heads'"]),
    ("v32", {"q_lora_rank": None}, ["q_lora_rank", "latent"]),
    ("v32", {"indexer_rope_interleave": True}, ["indexer_rope_interleave", "False"]),
    ("glm5", {"indexer_types": ["full"]}, ["indexer_types", "3 of"]),
    ("glm5", {"index_topk_pattern": "FSX"}, ["index_topk_pattern", "'full' and 'shared'"]),
    ("glm5", {"index_topk_pattern": "SFF"}, ["index_topk_pattern", "'full' first"]),
    ("v32", {"model_type": "deepseek_v3"}, ["model_type", "deepseek_v32"]),
    ("glm5", {"hc_mult": 4}, ["hc_mult"]),
    ("next", {"linear_num_value_heads": 24}, ["linear_num_value_heads", "16 key heads"]),
    ("next", {"linear_value_head_dim": 40}, ["linear_value_head_dim", "16"]),
    ("next", {"linear_key_head_dim": 24}, ["linear_key_head_dim", "16"]),
    ("next", {"linear_conv_kernel_dim": 9}, ["linear_conv_kernel_dim", "8"]),
    ("next", {"layer_types": ["linear_attention"] * 48}, ["layer_types", "full_attention"]),
    ("next", {"layer_types": ["full_attention"] * 3}, ["layer_types", "48"]),
    ("next", {"use_sliding_window": True}, ["use_sliding_window"]),
    ("next", {"attention_bias": True}, ["attention_bias"]),
    ("next", {"attn_output_gate": False}, ["attn_output_gate"]),
    ("next", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size"]),
    ("qwen35", {"text_config": None}, ["lacks 'text_config'"]),
    ("qwen35", qwen35_text(model_type="qwen3_5_text"), ["qwen3_5_text", "qwen3_5_moe_text"]),
    ("qwen35", qwen35_text(mamba_ssm_dtype="bfloat16"), ["mamba_ssm_dtype", "float32"]),
    ("qwen35", qwen35_text(mlp_only_layers=[1]), ["mlp_only_layers"]),
    ("qwen35", qwen35_text(norm_topk_prob=False), ["norm_topk_prob"]),
    ("qwen35", qwen35_text(hidden_act="gelu"), ["text_config", "hidden_act"]),
    ("qwen35", {"quantization_config": {"quant_method": "eetq"}}, ["eetq"]),
    ("kimi", {"text_config": None}, ["lacks 'text_config'"]),
    ("kimi", {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
    (
        "kimi",
        {"quantization_config": {"quant_method": "fp8"}},
        ["quantization_config", "block_size"],
    ),
    ("kimi", text_of(kv_lora_rank=None), ["text_config", "lacks 'kv_lora_rank'"]),
    ("kimi", text_of(model_type="kimi_linear"), ["kimi_linear", "kimi_k2"]),
    (
        "kimi",
        text_of(quantization_config={"quant_method": "compressed-tensors"}),
        ["text_config", "lacks 'config_groups'"],
    ),
]


@pytest.mark.parametrize(("base", "changes", "mentions"), REFUSED)
def test_refused_by_name(base: str, changes: dict[str, Any], mentions: list[str]):
    config = {k: v for k, v in (BASES[base] | changes).items() if v is not None}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(config)
    for words in mentions:
        assert words in str(error.value)
