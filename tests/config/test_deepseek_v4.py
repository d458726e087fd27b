"""config.json of DeepSeek-V4: as shipped, as transformers writes it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny_models

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.model_config import (
    ClampedSwiglu,
    CompressedConfig,
    ModelConfig,
    StreamsConfig,
)
from jaxmoe.layers.rope import attention_factor

SHIPPED = tiny_models.hf_config("deepseek_v4")
# What transformers writes for the same model.
_TYPES = ("sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse")
_WRITTEN: dict[str, Any] = {
    "compress_ratios": None,
    "layer_types": [f"{word}_attention" for word in _TYPES],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "num_hash_layers": None,
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
    "qk_rope_head_dim": None,
    "partial_rotary_factor": 0.125,
    "rope_scaling": None,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
        "compress": {
            **{k: v for k, v in SHIPPED["rope_scaling"].items() if k != "type"},
            **{"rope_type": "yarn", "rope_theta": 160000.0, "attention_factor": 1.0},
            "partial_rotary_factor": 0.125,
        },
    },
}


def parsed(**changes: Any) -> ModelConfig:
    config = {k: v for k, v in (SHIPPED | changes).items() if v is not None}
    return ModelConfig.from_hf(config)


def test_as_shipped():
    config = parsed()
    attention = config.attention
    assert isinstance(attention, CompressedConfig)
    assert attention.kinds == ("window", "sparse", "heavy", "sparse")
    assert [attention.ratio(i) for i in range(4)] == [0, 4, 128, 4]
    assert (config.rope.theta, config.rope.scaling) == (10000.0, None)
    turned = attention.compressed_rope
    assert turned.scaling is not None and turned.theta == 160000.0 and turned.at_end
    assert turned.dim == 64 and attention_factor(turned) == 1.0
    assert config.max_position == 1048576
    assert config.streams == StreamsConfig(4, 20, 1e-6)
    router = config.moe.router
    assert router.hashed_layers == (0, 1) and router.score == "sqrtsoftplus"
    assert (router.weight_scale, router.renormalize, router.num_groups) == (1.5, True, 1)
    assert config.moe.activation == ClampedSwiglu(1.0, 1.5, 0.0) == config.moe.shared_activation
    assert config.num_draft_layers == 1
    quant = config.quant
    assert (quant.format, quant.layout, quant.mxfp4_experts) == ("fp8_block", "deepseek_v4", True)


def test_as_transformers_writes_it():
    assert parsed(**_WRITTEN) == parsed()


def test_experts_of_fp8():
    assert not parsed(expert_dtype="fp8").quant.mxfp4_experts
    assert parsed(expert_dtype=None) == parsed()
    assert parsed(quantization_config=None, expert_dtype=None).quant.format == "none"


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"compress_ratios": [0, 8, 128, 4]}, ["compress_ratios", "0, 4 and 128"]),
    ({"compress_ratios": [0, 4]}, ["compress_ratios", "4 or more"]),
    ({"compress_rate_hca": 64}, ["compress_rate_hca", "128"]),
    ({"compress_rates": {"compressed_sparse_attention": 8}}, ["compress_rates"]),
    ({"layer_types": ["full_attention"] * 4}, ["layer_types", "sliding_attention"]),
    ({"mlp_layer_types": ["sparse"] * 4}, ["mlp_layer_types", "hash_moe"]),
    ({"num_hash_layers": None}, ["lacks 'num_hash_layers'"]),
    ({"scoring_func": "sigmoid"}, ["scoring_func", "sqrtsoftplus"]),
    ({"norm_topk_prob": False}, ["norm_topk_prob"]),
    ({"n_group": 8}, ["n_group"]),
    ({"num_key_value_heads": 4}, ["num_key_value_heads", "1"]),
    ({"o_groups": 3}, ["o_groups", "divisor of 4 heads"]),
    ({"index_head_dim": 32}, ["index_head_dim", "at least 64"]),
    ({"hc_mult": None}, ["lacks 'hc_mult'"]),
    ({"hc_sinkhorn_iters": 0}, ["hc_sinkhorn_iters"]),
    ({"swiglu_limit": 0}, ["swiglu_limit", "above 0"]),
    ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor", "0.125"]),
    ({"rope_scaling": SHIPPED["rope_scaling"] | {"mscale": 1.0}}, ["mscale", "absent"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", "yarn"]),
    ({"rope_scaling": {"type": "default", "low_freq_factor": 2.0}}, ["low_freq_factor"]),
    ({"rope_parameters": {"main": {"rope_type": "default"}}}, ["'main' and 'compress'"]),
    ({"attention_bias": True}, ["attention_bias"]),
    ({"expert_dtype": "nvfp4"}, ["expert_dtype", "fp4"]),
    ({"quantization_config": {"quant_method": "mxfp4"}}, ["quantization_config", "128x128"]),
]


@pytest.mark.parametrize(("changes", "mentions"), REFUSED)
def test_refused_by_name(changes: dict[str, Any], mentions: list[str]):
    with pytest.raises(ConfigError) as error:
        parsed(**changes)
    for words in mentions:
        assert words in str(error.value)
