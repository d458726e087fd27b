"""Which models a GPU's kernels can run, and what is said of those they cannot."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny_models

from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.placement import unsupported

UNSUPPORTED = [
    ("deepseek_v32_fp8", {}, ["beyond index_topk = 80", "max_model_len=80"]),
    ("glm_moe_dsa_sparse", {"max_model_len": 25}, ["index_topk = 24"]),
    ("qwen3_next", {}, ["recurrent layers"]),
    ("deepseek_v4", {}, ["DeepseekV4ForCausalLM", "attention has no GPU kernel"]),
    ("deepseek_v3_fp8", {"compute_dtype": "float32"}, ["float32 activations"]),
]
SUPPORTED = [
    ("deepseek_v3_fp8", {}),
    ("qwen3_moe", {}),
    ("deepseek_v32_fp8", {"max_model_len": 80}),
]


@pytest.mark.parametrize(("case", "options", "words"), UNSUPPORTED)
def test_what_has_no_kernel_is_named(case: str, options: dict[str, Any], words: list[str]):
    model = ModelConfig.from_hf(tiny_models.hf_config(case))
    problem = unsupported(model, EngineConfig(**options))
    assert problem is not None and all(word in problem for word in words)


@pytest.mark.parametrize(("case", "options"), SUPPORTED)
def test_what_has_one_is_let_in(case: str, options: dict[str, Any]):
    model = ModelConfig.from_hf(tiny_models.hf_config(case))
    assert unsupported(model, EngineConfig(**options)) is None
