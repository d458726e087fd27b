"""`quantization_config`: published ones parse, what cannot be represented is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny_models

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.model_config import ModelConfig, QuantConfig


def quant_of(case: str, **changes: Any) -> QuantConfig:
    config = tiny_models.hf_config(case)
    config["quantization_config"] = config["quantization_config"] | changes
    return ModelConfig.from_hf(config).quant


def group(case: str, **changes: Any) -> dict[str, Any]:
    """The one group of a compressed-tensors config, with changes to its weights' scheme; None
    leaves a key out.
    """
    given = tiny_models.hf_config(case)["quantization_config"]["config_groups"]["group_0"]
    weights = {k: v for k, v in (given["weights"] | changes).items() if v is not None}
    return {"config_groups": {"group_0": given | {"weights": weights}}}


def test_int4_of_kimi_k2_thinking():
    quant = quant_of("kimi_k2_int4")
    assert (quant.format, quant.layout) == ("int4_g32", "compressed-tensors")
    experts = "model.layers.1.mlp.experts.3.gate_proj"
    for module, converted in (
        (experts, True),
        ("model.layers.1.self_attn.o_proj", False),
        ("model.layers.1.mlp.shared_experts.up_proj", False),
        ("model.layers.0.mlp.down_proj", False),
        ("lm_head", False),
    ):
        assert quant.converts(module) == converted, module


def test_a_nested_config_is_read_where_it_lies():
    outer = tiny_models.hf_config("kimi_k25")
    inner = tiny_models.hf_config("kimi_k2_int4")["quantization_config"]
    nested = outer | {"text_config": outer["text_config"] | {"quantization_config": inner}}
    assert ModelConfig.from_hf(nested).quant.format == "int4_g32"
    assert ModelConfig.from_hf(outer | {"quantization_config": inner}).quant.format == "int4_g32"
    with pytest.raises(ConfigError, match="quantization_config.*given twice"):
        ModelConfig.from_hf(nested | {"quantization_config": inner})


def test_targets_may_be_patterns():
    targets = {"targets": [r"re:.*\.experts\..*"]}
    given = group("kimi_k2_int4")
    given["config_groups"]["group_0"] = given["config_groups"]["group_0"] | targets
    quant = quant_of("kimi_k2_int4", ignore=[], **given)
    assert quant.converts("model.layers.1.mlp.experts.3.gate_proj")
    assert not quant.converts("model.layers.1.self_attn.o_proj")


@pytest.mark.parametrize(
    ("case", "changes", "wanted"),
    [
        ("glm4_moe_fp8", {}, "fp8_channel"),
        (
            "glm4_moe_fp8",
            group("glm4_moe_fp8", strategy="block", block_structure=[128, 128]),
            "fp8_block",
        ),
        ("qwen3_moe_mxfp4", {}, "mxfp4"),
        ("qwen3_moe_mxfp4", group("qwen3_moe_mxfp4", num_bits=8), "mxfp8"),
        ("qwen3_moe_int4", {}, "int4_g128"),
        ("qwen3_moe_int4", group("qwen3_moe_int4", group_size=32), "int4_g32"),
        ("minimax_m2_mxfp8", {}, "mxfp8"),
        ("gpt_oss_mxfp4", {}, "mxfp4"),
        ("deepseek_v31_fp8", {}, "fp8_block"),
        ("qwen3_moe_awq", {}, "uint4_g128"),
        ("qwen3_moe_awq", {"group_size": 64}, "uint4_g32"),
        ("qwen3_moe_gptq", {}, "uint4_g32"),
        ("qwen3_moe_gptq", {"group_size": 128, "sym": False}, "uint4_g128"),
        ("qwen3_moe_nvfp4", {}, "nvfp4"),
        ("deepseek_v3_nvfp4", {}, "nvfp4"),
        ("kimi_k25_nvfp4", {}, "nvfp4"),
        ("deepseek_v3_nvfp4", {"kv_cache_scheme": {"num_bits": 8}}, "nvfp4"),
        ("glm4_moe_fp8", {"kv_cache_scheme": {"num_bits": 8}}, "fp8_channel"),
        ("glm4_moe_fp8", {"sparsity_config": {"format": "dense"}}, "fp8_channel"),
        ("glm4_moe_int4", {}, "uint4_g32"),
        ("glm4_moe_int4", group("glm4_moe_int4", group_size=128), "uint4_g128"),
        ("kimi_k2_int4", group("kimi_k2_int4", group_size=64), "uint4_g32"),
        ("qwen3_moe_gptq", {"desc_act": True, "static_groups": True}, "uint4_g32"),
        ("qwen3_5_moe_gptq", {}, "uint4_g128"),
    ],
)
def test_schemes(case: str, changes: dict[str, Any], wanted: str):
    assert quant_of(case, **changes).format == wanted


def test_what_awq_gptq_and_modelopt_keep():
    for case, kept in (
        (
            "qwen3_moe_awq",
            ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate"),
        ),
        ("qwen3_moe_gptq", ("lm_head", "model.layers.1.mlp.gate")),
        ("deepseek_v3_nvfp4", ("lm_head", "model.layers.0.self_attn.o_proj")),
    ):
        quant = quant_of(case)
        assert not any(quant.converts(module) for module in kept), case
        assert quant.converts("model.layers.1.mlp.experts.3.gate_proj"), case
    assert not quant_of("qwen3_moe_gptq").zeros_as_they_are
    assert quant_of("qwen3_moe_gptq", checkpoint_format="gptq_v2").zeros_as_they_are


AUTO_ROUND = {
    "autoround_version": "0.8.0",
    "batch_size": 8,
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "extra_config": {
        "model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"},
        ".*self_attn.*": {"bits": 16},
    },
    "group_size": 128,
    "iters": 200,
    "nsamples": 512,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "seqlen": 2048,
    "sym": True,
}


def auto_round(**changes: Any) -> QuantConfig:
    config = tiny_models.hf_config("qwen3_moe") | {"quantization_config": AUTO_ROUND | changes}
    return ModelConfig.from_hf(config).quant


def test_auto_round():
    quant = auto_round()
    assert (quant.format, quant.layout, quant.group) == ("uint4_g128", "gptq", 128)
    assert auto_round(packing_format="auto_round:auto_awq", sym=False).layout == "awq"
    for module, converted in (
        ("model.layers.0.mlp.gate", False),
        ("model.layers.0.mlp.gate_proj", True),
        ("model.layers.3.self_attn.o_proj", False),
        ("lm_head", False),
    ):
        assert quant.converts(module) == converted, module


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"bits": 2}, ["bits", "2"]),
        ({"sym": False}, ["sym", "False", "auto_gptq"]),
        ({"packing_format": "auto_round"}, ["packing_format", "auto_round:auto_gptq"]),
        ({"extra_config": {"model.layers.0.mlp.gate": {"bits": 8}}}, ["extra_config", "16 or 32"]),
        ({"extra_config": {"(": {"bits": 16}}}, ["extra_config", "regular expression"]),
        ({"data_type": "mx_fp"}, ["data_type", "mx_fp"]),
        ({"act_bits": 8}, ["act_bits", "8"]),
        ({"rotation_config": {"a": 1}}, ["rotation_config"]),
    ],
)
def test_other_kinds_of_auto_round_are_refused(changes: dict[str, Any], mentions: list[str]):
    with pytest.raises(ConfigError) as error:
        auto_round(**changes)
    for words in ("quantization_config", *mentions):
        assert words in str(error.value)


def activations(**changes: Any) -> dict[str, Any]:
    given = tiny_models.hf_config("glm4_moe_fp8")["quantization_config"]["config_groups"]["group_0"]
    changed = given | {"input_activations": given["input_activations"] | changes}
    return {"config_groups": {"group_0": changed}}


REFUSED = [
    ("kimi_k2_int4", group("kimi_k2_int4", symmetric="no"), ["symmetric", "no"]),
    ("glm4_moe_int4", group("glm4_moe_int4", num_bits=8), ["int 8 group 32 with zero points"]),
    ("glm4_moe_int4", group("glm4_moe_int4", strategy="channel"), ["int 4 channel with zero"]),
    ("glm4_moe_int4", group("glm4_moe_int4", actorder="group"), ["actorder", "group"]),
    ("kimi_k2_int4", group("kimi_k2_int4", actorder="group"), ["actorder", "group"]),
    ("kimi_k2_int4", group("kimi_k2_int4", group_size=48), ["int 4 group 48", "multiple of 32"]),
    ("kimi_k2_int4", group("kimi_k2_int4", num_bits=8), ["int 8 group 32"]),
    ("kimi_k2_int4", group("kimi_k2_int4", type=None), ["lacks 'type'"]),
    ("kimi_k2_int4", group("kimi_k2_int4", strategy="tensor_group"), ["int 4 tensor_group 32"]),
    ("glm4_moe_fp8", group("glm4_moe_fp8", strategy="tensor"), ["strategy", "'tensor'"]),
    ("glm4_moe_fp8", group("glm4_moe_fp8", strategy="block"), ["block_structure", "128"]),
    ("glm4_moe_fp8", activations(dynamic=False), ["input_activations", "fixed scales"]),
    ("glm4_moe_fp8", activations(dynamic="local"), ["input_activations", "fixed scales"]),
    ("glm4_moe_fp8", {"sparsity_config": {"format": "sparse-24"}}, ["sparsity_config", "dense"]),
    ("glm4_moe_fp8", {"transform_config": {"config_groups": {"a": {}}}}, ["transform_config"]),
    ("glm4_moe_fp8", {"format": "int-quantized"}, ["format", "int-quantized"]),
    ("glm4_moe_fp8", {"ignore": ["re:("]}, ["ignore", "regular expression"]),
    ("glm4_moe_fp8", {"config_groups": {}}, ["config_groups", "one group"]),
    ("glm4_moe_fp8", {"config_groups": {"a": {}, "b": {}}}, ["config_groups", "one group"]),
    ("glm4_moe_fp8", {"config_groups": {"a": {}}}, ["lacks 'weights'"]),
    ("minimax_m2_mxfp8", {"weight_block_size": [128, 128]}, ["weight_block_size", "[1, 32]"]),
    ("minimax_m2_mxfp8", {"activation_scheme": "static"}, ["activation_scheme", "static"]),
    ("deepseek_v31_fp8", {"scale_fmt": "e5m3"}, ["scale_fmt", "e5m3"]),
    ("deepseek_v31_fp8", {"quant_method": "hqq", "bits": 4}, ["hqq", "compressed-tensors"]),
    ("qwen3_moe_awq", {"bits": 8}, ["bits", "8"]),
    ("qwen3_moe_awq", {"version": "gemv"}, ["version", "gemv"]),
    ("qwen3_moe_awq", {"group_size": 16}, ["group_size", "16", "multiple of 32"]),
    ("qwen3_moe_awq", {"group_size": -1}, ["group_size", "-1"]),
    ("qwen3_moe_gptq", {"desc_act": True}, ["desc_act", "True", "static_groups true"]),
    ("qwen3_5_moe_gptq", {"dynamic": {"lm_head": {"bits": 8}}}, ["dynamic", "lm_head"]),
    ("qwen3_moe_gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
    ("qwen3_moe_gptq", {"dynamic": {"+:.*down_proj": {"bits": 8}}}, ["dynamic", "down_proj"]),
    ("qwen3_moe_gptq", {"dynamic": {"-:(": {}}}, ["dynamic", "regular expression"]),
    ("deepseek_v3_nvfp4", {"quant_algo": "FP8"}, ["quant_algo", "FP8"]),
    ("deepseek_v3_nvfp4", {"quant_algo": "MIXED_PRECISION"}, ["quant_algo", "MIXED_PRECISION"]),
    ("deepseek_v3_nvfp4", {"kv_cache": {"a": 1}}, ["kv_cache"]),
]


@pytest.mark.parametrize(("case", "changes", "mentions"), REFUSED)
def test_refused_by_name(case: str, changes: dict[str, Any], mentions: list[str]):
    with pytest.raises(ConfigError) as error:
        quant_of(case, **changes)
    for words in ("quantization_config", *mentions):
        assert words in str(error.value)


ODD = (None, True, 0, 1.5, 10**30, "x", [], [1], {}, {"a": 1}, [[]])


@pytest.mark.parametrize("case", ["qwen3_moe_awq", "qwen3_moe_gptq", "deepseek_v3_nvfp4"])
def test_odd_values_of_other_methods_are_refused_or_harmless(case: str):
    whole = tiny_models.hf_config(case)["quantization_config"]
    refused = 0
    for key in whole:
        for value in ODD:
            try:
                quant_of(case, **{key: value})
            except ConfigError:
                refused += 1
    assert refused > len(ODD)


@pytest.mark.parametrize("case", ["glm4_moe_fp8", "kimi_k2_int4"])
def test_odd_values_are_refused_or_harmless(case: str):
    """No value anywhere in it ends in anything but a config or a ConfigError."""
    whole = tiny_models.hf_config(case)["quantization_config"]
    paths = [(key,) for key in whole]
    paths += [("config_groups", "group_0", key) for key in whole["config_groups"]["group_0"]]
    weights = whole["config_groups"]["group_0"]["weights"]
    paths += [("config_groups", "group_0", "weights", key) for key in weights]
    refused = 0
    for path in paths:
        for value in ODD:
            try:
                quant_of(case, **_replaced(whole, path, value))
            except ConfigError:
                refused += 1
    assert refused > len(paths) * 4


def _replaced(node: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    if len(path) > 1:
        value = _replaced(node[path[0]], path[1:], value)
    return node | {path[0]: value}
