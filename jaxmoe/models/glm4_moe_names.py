"""Tensor names of GLM-4.5 and later: Qwen3-MoE's attention with DeepSeek's feed-forward block."""

from __future__ import annotations

from jaxmoe.models.deepseek_names import DeepseekNames
from jaxmoe.models.qwen3_moe_names import Qwen3MoeNames


class Glm4MoeNames(Qwen3MoeNames):
    modules = {
        **Qwen3MoeNames.modules,
        **{p: name for p, name in DeepseekNames.modules.items() if p.startswith("mlp.")},
    }
    leaves = DeepseekNames.leaves
