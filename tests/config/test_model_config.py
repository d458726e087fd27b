"""config.json to ModelConfig: published ones parse, everything else is refused by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support import tiny_models

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.model_config import GqaConfig, MlaConfig, ModelConfig

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
BASES = {"v3": DEEPSEEK_V3, "qwen3": QWEN3_30B, "v2": tiny_models.hf_config("deepseek_v2")}


def test_deepseek_v3_as_published(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert not caplog.records  # every key is understood
    assert isinstance(config.attention, MlaConfig)
    assert config.attention.q_lora_rank == 1536
    # (0.1 ln 40 + 1)² = 1.3689²
    assert config.attention.softmax_scale == pytest.approx(192**-0.5 * 1.36888794541**2)
    assert config.mlp_types == ("dense",) * 3 + ("moe",) * 58
    assert config.moe_layers == tuple(range(3, 61))
    router = config.moe.router
    assert (router.num_groups, router.groups_per_token, router.group_score) == (8, 4, "top2_sum")
    assert router.correction_bias and router.renormalize and router.weight_scale == 2.5
    assert config.moe.shared_intermediate == 2048
    assert config.rope.interleaved and config.rope.dim == 64
    assert config.rope.scaling is not None and config.rope.scaling.factor == 40
    assert config.quant.format == "fp8_block"
    assert config.max_position == 163840
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))


def test_qwen3_as_published(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_hf(QWEN3_30B)
    assert not caplog.records
    assert config.attention == GqaConfig(32, 4, 128, 128**-0.5, qk_norm="head")
    assert not config.rope.interleaved and config.rope.scaling is None
    assert config.rope.theta == 1e6
    assert config.mlp_types == ("moe",) * 48
    assert config.moe.router.score == "softmax" and config.moe.router.renormalize
    assert config.moe.shared_intermediate == 0
    assert config.quant.format == "none"


def test_qwen3_coder_spells_out_what_the_architecture_implies(caplog: pytest.LogCaptureFixture):
    coder = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    with caplog.at_level(logging.WARNING):
        assert ModelConfig.from_hf(QWEN3_30B | coder) == ModelConfig.from_hf(QWEN3_30B)
    assert not caplog.records


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_tiny_cases_parse(case: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_hf(tiny_models.hf_config(case))
    assert not caplog.records
    experts = "mxfp4" if config.quant.mxfp4_experts else config.quant.format
    assert experts == tiny_models.FORMATS.get(case, "none")


def test_both_spellings_of_rope_agree():
    new = {k: v for k, v in DEEPSEEK_V3.items() if not k.startswith("rope_")}
    scaling = {k: v for k, v in DEEPSEEK_V3["rope_scaling"].items() if k != "type"}
    new["rope_parameters"] = scaling | {"rope_type": "yarn", "rope_theta": 10000.0}
    new["dtype"] = new.pop("torch_dtype")
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(DEEPSEEK_V3)


def test_layer_patterns():
    frequency = ModelConfig.from_hf(DEEPSEEK_V3 | {"moe_layer_freq": 2, "num_hidden_layers": 8})
    assert frequency.moe_layers == (4, 6)
    marks = [0, 1, 1, 0, 1]
    listed = ModelConfig.from_hf(
        DEEPSEEK_V3 | {"moe_layer_freq": marks, "num_hidden_layers": 5, "first_k_dense_replace": 0}
    )
    assert listed.moe_layers == (1, 2, 4)
    sparse = ModelConfig.from_hf(
        QWEN3_30B | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}
    )
    assert sparse.moe_layers == (1, 5)


def test_token_ids_and_aliases():
    config = ModelConfig.from_hf(QWEN3_30B | {"eos_token_id": [151645, 151643]})
    assert config.eos_token_ids == (151645, 151643)
    without = {k: v for k, v in QWEN3_30B.items() if k not in ("eos_token_id", "num_experts")}
    config = ModelConfig.from_hf(without | {"num_local_experts": 64})
    assert config.eos_token_ids == () and config.moe.router.num_experts == 64


def test_yarn_on_qwen3_extends_the_context():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_hf(QWEN3_30B | {"rope_scaling": scaling})
    assert config.max_position == 131072
    assert config.attention.softmax_scale == 128**-0.5  # sharpened in cos and sin instead


def test_kimi_k2_is_a_deepseek_v3_with_one_group():
    config = ModelConfig.from_hf(tiny_models.hf_config("kimi_k2"))
    assert config.model_type == "kimi_k2" and config.moe.router.num_groups == 1


def test_unknown_keys_are_reported(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        ModelConfig.from_hf(QWEN3_30B | {"brand_new": 1, "switched_off": False})
    assert "brand_new" in caplog.text and "switched_off" not in caplog.text


# base, changes (None removes the key), what the message must contain
REFUSED = [
    ("v3", {"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "Qwen3MoeForCausalLM"]),
    ("v3", {"architectures": None}, ["architectures", "DeepseekV3ForCausalLM"]),
    ("v3", {"architectures": ["DeepseekV3ForCausalLM"] * 2}, ["exactly one"]),
    ("v3", {"model_type": "deepseek_v32"}, ["model_type", "deepseek_v32", "kimi_k2"]),
    ("v3", {"index_topk": 2048}, ["index_topk", "2048"]),
    ("v3", {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ("v3", {"attention_bias": True}, ["attention_bias", "True"]),
    ("v3", {"scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
    ("v3", {"topk_method": "greedy"}, ["topk_method", "noaux_tc"]),
    ("v3", {"n_group": 7}, ["n_group", "7", "256"]),
    ("v3", {"topk_group": 9}, ["topk_group", "9"]),
    ("v3", {"topk_group": 1, "num_experts_per_tok": 33}, ["num_experts_per_tok", "32"]),
    ("v3", {"n_group": 256}, ["n_group", "at least 2"]),
    ("v3", {"n_group": None}, ["lacks 'n_group'"]),
    ("v3", {"topk_group": None}, ["lacks 'topk_group'"]),
    ("v3", {"routed_scaling_factor": None}, ["lacks 'routed_scaling_factor'"]),
    ("v3", {"num_key_value_heads": 8}, ["num_key_value_heads", "128"]),
    ("v3", {"kv_lora_rank": None}, ["lacks 'kv_lora_rank'"]),
    ("v3", {"hidden_size": "big"}, ["hidden_size", "big", "integer"]),
    ("v3", {"hidden_size": True}, ["hidden_size", "True"]),
    ("v3", {"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
    ("v3", {"num_hidden_layers": 10**30}, ["num_hidden_layers", "at most"]),
    ("v3", {"num_hidden_layers": 1001}, ["num_hidden_layers", "at most 1000"]),
    ("v3", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "finite"]),
    ("v3", {"moe_layer_freq": [1, 0]}, ["moe_layer_freq", "61"]),
    ("v3", {"qk_rope_head_dim": 63}, ["even", "63"]),
    ("v3", {"rope_scaling": {"type": "linear", "factor": 2}}, ["type", "linear", "yarn"]),
    ("v3", {"rope_scaling": {"type": "yarn", "factor": 2, "twist": 3}}, ["twist"]),
    ("v3", {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}}, ["mscale", "0.7"]),
    ("v3", {"rope_scaling": [1]}, ["rope_scaling", "object"]),
    ("v3", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, ["factor", "at least 1"]),
    ("v3", {"rope_theta": 1}, ["rope_theta", "above 1"]),
    (
        "v3",
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}},
        ["beta_fast", "at least 2"],
    ),
    ("v3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ("v3", {"torch_dtype": "float16"}, ["'torch_dtype'", "float16", "bfloat16"]),
    ("v3", {"eos_token_id": "</s>"}, ["eos_token_id"]),
    ("v3", {"quantization_config": {"quant_method": "eetq"}}, ["eetq", "fp8"]),
    ("v3", {"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size", "128"]),
    (
        "v3",
        {"quantization_config": DEEPSEEK_V3["quantization_config"] | {"fmt": "e5m2"}},
        ["fmt", "e5m2"],
    ),
    (
        "v3",
        {"quantization_config": DEEPSEEK_V3["quantization_config"] | {"kv_cache_scheme": "fp8"}},
        ["kv_cache_scheme"],
    ),
    ("v3", {"compression_config": {"format": "int-quantized"}}, ["compression_config"]),
    ("v2", {"norm_topk_prob": True}, ["norm_topk_prob", "True"]),
    ("v2", {"scoring_func": "sigmoid"}, ["scoring_func", "softmax"]),
    ("v2", {"topk_method": "noaux_tc"}, ["topk_method", "group_limited_greedy"]),
    ("v2", {"n_group": None}, ["lacks 'n_group'"]),
    ("v2", {"mlp_bias": True}, ["mlp_bias"]),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4096}, ["use_sliding_window"]),
    ("qwen3", {"layer_types": ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias"]),
    ("qwen3", {"qkv_bias": True}, ["qkv_bias", "True"]),
    ("qwen3", {"use_qk_norm": False}, ["use_qk_norm", "False"]),
    ("qwen3", {"shared_expert_intermediate_size": 64}, ["shared_expert_intermediate_size", "64"]),
    ("qwen3", {"num_key_value_heads": 5}, ["num_key_value_heads", "5"]),
    ("qwen3", {"num_experts_per_tok": 129}, ["num_experts_per_tok", "129"]),
    ("qwen3", {"mlp_only_layers": [48]}, ["mlp_only_layers", "48"]),
    ("qwen3", {"mlp_only_layers": "all"}, ["mlp_only_layers"]),
    ("qwen3", {"norm_topk_prob": 1}, ["norm_topk_prob", "true or false"]),
]


@pytest.mark.parametrize(("base", "changes", "mentions"), REFUSED)
def test_refused_by_name(base: str, changes: dict[str, Any], mentions: list[str]):
    config = {k: v for k, v in (BASES[base] | changes).items() if v is not None}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(config)
    for words in mentions:
        assert words in str(error.value)


ODD_VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    10**400,
    float("nan"),
    "x",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("base", BASES)
def test_odd_values_are_refused_or_harmless(base: str):
    """No value of any key, nested ones included, ends in anything but a config or a ConfigError."""
    paths = [(key,) for key in BASES[base]]
    for table in ("rope_scaling", "quantization_config"):
        paths += [(table, key) for key in BASES[base].get(table) or {}]
    refused = 0
    for path in paths:
        for value in ODD_VALUES:
            config = dict(BASES[base])
            if len(path) == 2:
                config[path[0]] = config[path[0]] | {path[1]: value}
            else:
                config[path[0]] = value
            try:
                ModelConfig.from_hf(config)
            except ConfigError:
                refused += 1
    assert refused > 100


def test_not_an_object():
    with pytest.raises(ConfigError, match="list"):
        ModelConfig.from_hf([])  # type: ignore[arg-type]
