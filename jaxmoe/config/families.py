"""Which parser reads the config.json of which architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.config import (
    deepseek,
    deepseek_v4,
    glm4_moe,
    gpt_oss,
    kimi_k25,
    minimax_m2,
    mixtral,
    olmoe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig

PARSERS: Mapping[str, Callable[[HfFields, str], ModelConfig]] = {
    "DeepseekV2ForCausalLM": deepseek.parse,
    "DeepseekV3ForCausalLM": deepseek.parse,
    "DeepseekV32ForCausalLM": deepseek.parse,
    "DeepseekV4ForCausalLM": deepseek_v4.parse,
    "Glm4MoeForCausalLM": glm4_moe.parse,
    "Glm4MoeLiteForCausalLM": deepseek.parse,
    "GlmMoeDsaForCausalLM": deepseek.parse,
    "GptOssForCausalLM": gpt_oss.parse,
    "KimiK25ForConditionalGeneration": kimi_k25.parse,
    "MiniMaxM2ForCausalLM": minimax_m2.parse,
    "MixtralForCausalLM": mixtral.parse,
    "OlmoeForCausalLM": olmoe.parse,
    "Qwen3MoeForCausalLM": qwen3_moe.parse,
    "Qwen3NextForCausalLM": qwen3_next.parse,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe.parse,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    if not isinstance(config, Mapping):
        raise ConfigError(f"config.json holds a {type(config).__name__}; wanted an object")
    fields = HfFields(config, "config.json")
    supported = ", ".join(PARSERS)
    architectures = fields.raw("architectures", default=[])
    if not isinstance(architectures, (list, tuple)) or len(architectures) != 1:
        raise fields.fail("architectures", architectures, f"a list with exactly one of {supported}")
    architecture = architectures[0]
    if not isinstance(architecture, str) or architecture not in PARSERS:
        raise fields.fail("architectures", architecture, supported)
    return PARSERS[architecture](fields, architecture)
