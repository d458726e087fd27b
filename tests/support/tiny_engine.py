"""A tiny random model on the reference operations, for tests of what surrounds the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.hybrid_step import BatchPolicy, HybridStep
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.kv_cache import store
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.models.decoder import cache_spec
from jaxmoe.models.registry import configured_formats, describe_model
from support import tiny_models


def config(case: str = "qwen3_moe", **changes: Any) -> ModelConfig:
    hf = tiny_models.hf_config(case) | {"num_hidden_layers": 1} | changes
    return ModelConfig.from_hf(hf)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    config: ModelConfig
    graphdef: Any
    state: Any
    ops: ReferenceOps


def model(model_config: ModelConfig, seed: int = 0) -> TinyModel:
    """Random weights, sharp enough that greedy texts vary."""
    rng = np.random.default_rng(seed)
    description = describe_model(model_config, "float32", configured_formats(model_config))

    def leaf(spec):
        if spec.kind == "norm":
            values = 1 + 0.2 * rng.standard_normal(spec.shape)
        else:
            values = rng.standard_normal(spec.shape) / np.sqrt(spec.shape[-1])
            values *= 3.0 if spec.kind in ("matrix", "embedding") else 1.0
        return jnp.asarray(values, spec.dtype)

    state = description.fill({name: leaf(spec) for name, spec in description.specs.items()})
    moe, hidden = model_config.moe, model_config.hidden_size
    shapes = {
        "gate": (moe.router.num_experts, moe.expert_intermediate, hidden),
        "up": (moe.router.num_experts, moe.expert_intermediate, hidden),
        "down": (moe.router.num_experts, hidden, moe.expert_intermediate),
    }

    def experts():
        return {
            name: Weight(jnp.asarray(rng.standard_normal(s) / np.sqrt(s[-1]), jnp.bfloat16))
            for name, s in shapes.items()
        }

    ops = ReferenceOps([experts() for _ in model_config.moe_layers])
    return TinyModel(model_config, description.graphdef, state, ops)


def step(
    tiny: TinyModel,
    layout: CacheLayout,
    *,
    num_slots: int,
    chunk_tokens: int,
    policy: BatchPolicy | None = None,
) -> HybridStep:
    caches = store.allocate(cache_spec(tiny.config, "float32"), layout.num_pages, layout.page_size)
    return HybridStep(
        tiny.graphdef,
        tiny.state,
        {"prefill": tiny.ops, "decode": tiny.ops},
        caches,
        page_size=layout.page_size,
        pages_per_sequence=layout.pages_per_sequence,
        num_slots=num_slots,
        chunk_tokens=chunk_tokens,
        vocab_size=tiny.config.vocab_size,
        policy=policy,
    )
