"""Tensor names of Mixtral: experts and router in `block_sparse_moe`, matrices by number."""

from __future__ import annotations

from jaxmoe.models.qwen3_moe_names import Qwen3MoeNames


class MixtralNames(Qwen3MoeNames):
    modules = {**Qwen3MoeNames.modules, "mlp.router.logits": "block_sparse_moe.gate"}
    expert = "block_sparse_moe.experts.{expert}.{which}"
    expert_matrices = {"gate": "w1", "up": "w3", "down": "w2"}
