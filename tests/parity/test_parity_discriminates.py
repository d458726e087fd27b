"""Parity notices a missing term: each mutation must leave the tolerance far behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.compare import relative_error
from support.parity import load_fixture
from support.tiny_runner import reference_runner

from jaxmoe.config.model_config import ModelConfig

MUST_EXCEED = 2e-3  # 20 times what the parity test allows
NUM_TOKENS = 32


def edit(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    """Changes fields by path: `attention__qk_norm="none"`, `moe__router__num_groups=1`."""

    def apply(node: Any) -> Any:
        for path, value in changes.items():
            node = _replace(node, path.split("__"), value)
        return node

    return apply


def _replace(node: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replace(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: value})


MUTATIONS = {
    "no YaRN mscale": ("deepseek_v3", edit(attention__softmax_scale=192**-0.5)),
    "no YaRN": ("kimi_k2", edit(rope__scaling=None)),
    "half-split rope": ("deepseek_v3", edit(rope__interleaved=False)),
    "no correction bias": ("deepseek_v3", edit(moe__router__correction_bias=False)),
    "no groups": ("deepseek_v2", edit(moe__router__num_groups=1)),
    "groups by their best": ("deepseek_v3", edit(moe__router__group_score="max")),
    "no renormalisation": ("qwen3_moe", edit(moe__router__renormalize=False)),
    "no scaling factor": ("kimi_k2", edit(moe__router__weight_scale=1.0)),
    "no shared experts": ("deepseek_v2_lite", edit(moe__shared_intermediate=0)),
    "no QK norm": ("qwen3_moe", edit(attention__qk_norm="none")),
    "other norm eps": ("qwen3_moe", edit(norm_eps=1e-2)),
    "no renormalisation of two": ("mixtral", edit(moe__router__renormalize=False)),
    "no QK norm of the row": ("olmoe", edit(attention__qk_norm="none")),
    "no clipping": ("olmoe", edit(attention__qkv_clip=None)),
    "no sinks": ("gpt_oss", edit(attention__sinks=False)),
    "no window": ("gpt_oss", edit(windows=())),
    "no clamping": ("gpt_oss", edit(moe__activation__limit=1e9)),
    "no expert biases": ("gpt_oss", edit(moe__expert_bias=False)),
    "no router bias": ("gpt_oss", edit(moe__router__logit_bias=False)),
    "no YaRN concentration": ("gpt_oss", edit(rope__scaling__attention_factor=1.0)),
    "no biases": ("glm4_moe", edit(attention__qkv_bias=False)),
    "whole heads turned": ("glm4_moe", edit(rope__dim=128)),
    "scale of the part without rope": ("glm4_moe_lite", edit(attention__softmax_scale=192**-0.5)),
    "no correction bias of its own place": (
        "minimax_m2",
        edit(moe__router__correction_bias=False),
    ),
    "norms by their stored weights": ("qwen3_next", edit(norm_offset=0.0)),
    "whole heads of 256 turned": ("qwen3_next", edit(rope__dim=256)),
    "ungated shared expert": ("qwen3_next", edit(moe__shared_gate=False)),
    "no renormalisation of Qwen3.5": ("qwen3_5_moe", edit(moe__router__renormalize=False)),
    "no YaRN mscale at K2.5's factor": ("kimi_k25", edit(attention__softmax_scale=192**-0.5)),
}


def _ungated(path: str, leaf: np.ndarray) -> np.ndarray:
    """Every attention output's gate the same: a half."""
    if not path.endswith("attention.q.data"):
        return leaf
    heads = leaf.copy().reshape(-1, 2, 256, leaf.shape[1])
    heads[:, 1] = 0
    return heads.reshape(leaf.shape)


def _without_decay(path: str, leaf: np.ndarray) -> np.ndarray:
    return np.full_like(leaf, -100.0) if path.endswith(".a_log") else leaf


def _without_step_bias(path: str, leaf: np.ndarray) -> np.ndarray:
    return np.zeros_like(leaf) if path.endswith(".dt_bias") else leaf


def _without_convolution(path: str, leaf: np.ndarray) -> np.ndarray:
    if not path.endswith(".conv"):
        return leaf
    return np.concatenate([np.zeros_like(leaf[:-1]), leaf[-1:]])


def _plain_linear_norm(path: str, leaf: np.ndarray) -> np.ndarray:
    return leaf + 1.0 if path.endswith("attention.norm.weight") else leaf


# Of weights, where no field of the config turns a detail off.
CHANGES = {
    "no output gate": ("qwen3_next", _ungated),
    "no decay": ("qwen3_next", _without_decay),
    "no bias of the decay": ("qwen3_5_moe", _without_step_bias),
    "no convolution": ("qwen3_5_moe", _without_convolution),
    "an offset in linear attention's norm": ("qwen3_5_moe", _plain_linear_norm),
}


# For the slow run: like another family's, or beside a mutation of the same family.
SLOW = (
    *("no renormalisation of two", "no clipping", "scale of the part without rope"),
    *("no YaRN mscale at K2.5's factor", "no expert biases", "no router bias"),
    *("no YaRN concentration", "no renormalisation of Qwen3.5", "whole heads of 256 turned"),
)


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MUTATIONS],
)
def test_mutation_is_noticed(mutation: str):
    case, change = MUTATIONS[mutation]
    fixture = load_fixture(case)
    prompt = fixture.prompts[0][:NUM_TOKENS]
    runner = reference_runner(case, "float32", change)
    (logits,) = runner.step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) > MUST_EXCEED


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_noticed(name: str):
    case, change = CHANGES[name]
    fixture = load_fixture(case)
    prompt = fixture.prompts[0][:NUM_TOKENS]
    runner = reference_runner(case, "float32", change=change)
    (logits,) = runner.step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) > MUST_EXCEED


def test_without_mutation_the_same_comparison_holds():
    fixture = load_fixture("deepseek_v3")
    prompt = fixture.prompts[0][:NUM_TOKENS]
    (logits,) = reference_runner("deepseek_v3", "float32").step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) <= 1e-4
    assert np.isfinite(logits).all()
