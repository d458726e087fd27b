"""Parity notices a missing term: each mutation must leave the tolerance far behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.compare import relative_error
from support.parity import load_fixture
from support.tiny_runner import change_stored, reference_runner

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi import reference

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
    "no indexer": ("deepseek_v32_sparse", edit(attention__indexer=None)),
    "one position fewer": ("deepseek_v32_sparse", edit(attention__indexer__top_k=23)),
    "neighbours of the indexer turned": (
        "deepseek_v32_sparse",
        edit(attention__indexer__rope__interleaved=True),
    ),
    "halves of the indexer turned": (
        "glm_moe_dsa_sparse",
        edit(attention__indexer__rope__interleaved=False),
    ),
    "no YaRN mscale at K2.5's factor": ("kimi_k25", edit(attention__softmax_scale=192**-0.5)),
}


# For the slow run: like another family's, or beside a mutation of the same family.
SLOW = (
    *("no renormalisation of two", "no clipping", "scale of the part without rope"),
    *("no YaRN mscale at K2.5's factor", "no expert biases", "no router bias"),
    *("neighbours of the indexer turned", "one position fewer"),
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


def change(suffix: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    """Changes all tensors whose names end like that."""

    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: make(t) for name, t in tensors.items() if name.endswith(suffix)})

    return apply


def swap_nibbles(words: np.ndarray) -> np.ndarray:
    values = words.view(np.uint8)
    return ((values >> 4) | (values << 4)).view(words.dtype)


def shift_groups(scale: np.ndarray) -> np.ndarray:
    return np.roll(scale, 1, axis=-1)


def shift_rows_of_gate_up(blocks: np.ndarray) -> np.ndarray:
    return np.roll(blocks, 1, axis=1) if blocks.shape[1] == 320 else blocks  # not of down


def shift_rows(scale: np.ndarray) -> np.ndarray:
    return np.roll(scale, 1, axis=-2)


def ungated(q: np.ndarray) -> np.ndarray:
    """Every attention output's gate the same: a half."""
    heads = q.copy().reshape(-1, 2, 256, q.shape[1])
    heads[:, 1] = 0
    return heads.reshape(q.shape)


def last_token_only(conv: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(conv[..., :-1]), conv[..., -1:]], axis=-1)


# Of weights, where no field of the config turns a detail off.
WEIGHT_MUTATIONS = {
    "no output gate": ("qwen3_next", change("self_attn.q_proj.weight", ungated)),
    "no decay": ("qwen3_next", change(".A_log", lambda a: np.full_like(a, -100.0))),
    "no bias of the decay": ("qwen3_5_moe", change(".dt_bias", np.zeros_like)),
    "no convolution": ("qwen3_5_moe", change(".conv1d.weight", last_token_only)),
    "no head weights of the indexer": (
        "deepseek_v32_sparse",
        change("indexer.weights_proj.weight", np.ones_like),
    ),
    "no bias of the indexer's norm": (
        "deepseek_v32_sparse",
        change("indexer.k_norm.bias", np.zeros_like),
    ),
    "an offset in linear attention's norm": (
        "qwen3_5_moe",
        change("linear_attn.norm.weight", lambda w: w + w.dtype.type(1)),
    ),
}


@pytest.mark.parametrize("case", ["qwen3_next", "qwen3_5_moe", "deepseek_v32_sparse"])
def test_changed_weights_are_noticed(case: str):
    fixture = load_fixture(case)
    prompt = fixture.prompts[0][:NUM_TOKENS]
    runner = reference_runner(case, "float32")
    (logits,) = runner.step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) <= 1e-4
    for name, (of, edit_tensors) in WEIGHT_MUTATIONS.items():
        if of == case:
            change_stored(runner, case, "float32", edit_tensors)
            (logits,) = runner.step([prompt], NUM_TOKENS)
            assert relative_error(logits, fixture.logits[: len(prompt)]) > MUST_EXCEED, name


FORMAT_MUTATIONS = {
    "INT4's nibbles swapped": ("kimi_k2_int4", change(".weight_packed", swap_nibbles)),
    "INT4's scales of the next group": ("kimi_k2_int4", change(".weight_scale", shift_groups)),
    "scales of the next 128": ("qwen3_moe_int4", change(".weight_scale", shift_groups)),
    "MXFP4's nibbles swapped": ("gpt_oss_mxfp4", change("_blocks", swap_nibbles)),
    "MXFP4's scales of the next group": ("gpt_oss_mxfp4", change("_scales", shift_groups)),
    "gate and up the other way round": (
        "gpt_oss_mxfp4",
        change("_proj_blocks", shift_rows_of_gate_up),
    ),
    "packed MXFP4's nibbles swapped": ("qwen3_moe_mxfp4", change(".weight_packed", swap_nibbles)),
    "e8m0 off by one": ("qwen3_moe_mxfp4", change(".weight_scale", lambda s: s + np.uint8(1))),
    "MXFP8's scales of the next group": (
        "minimax_m2_mxfp8",
        change(".weight_scale_inv", shift_groups),
    ),
    "AWQ's zero points one off": (
        "qwen3_moe_awq",
        change(".qzeros", lambda z: z ^ np.int32(0x11111111)),
    ),
    "compressed-tensors' zero points one off": (
        "glm4_moe_int4",
        change(".weight_zero_point", lambda z: z ^ np.int32(0x11111111)),
    ),
    "AWQ's outputs as they lie": ("qwen3_moe_awq", change(".qweight", swap_nibbles)),
    "GPTQ's zero points as stored": (
        "qwen3_moe_gptq",
        change(".qzeros", lambda z: z - np.int32(0x11111111)),
    ),
    "GPTQ's scales of the next group": ("qwen3_moe_gptq", change(".scales", shift_rows)),
    "NVFP4's scales of the next group": ("qwen3_moe_nvfp4", change(".weight_scale", shift_groups)),
    "NVFP4's factor the other way round": (
        "qwen3_moe_nvfp4",
        change(".weight_global_scale", lambda g: 1 / g),
    ),
    "ModelOpt's factor left out": (
        "deepseek_v3_nvfp4",
        change(".weight_scale_2", lambda g: g * 0 + np.float32(1 / 256)),
    ),
    "scales of the next row": ("glm4_moe_fp8", change(".weight_scale", shift_rows)),
    "e8m0 scales of the next block": (
        "deepseek_v31_fp8",
        change(".weight_scale_inv", shift_groups),
    ),
}
# For the slow run: of cases whose reading is held to the bytes in other tests too.
SLOW_FORMATS = (
    *("qwen3_moe_int4", "deepseek_v31_fp8", "qwen3_moe_nvfp4", "deepseek_v3_nvfp4"),
    "glm4_moe_int4",
)
FORMAT_CASES = list(dict.fromkeys(case for case, _ in FORMAT_MUTATIONS.values()))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in SLOW_FORMATS else [])
        for case in FORMAT_CASES
    ],
)
def test_another_reading_of_the_bytes_is_noticed(case: str):
    fixture = load_fixture(case)
    prompt = fixture.prompts[0][:NUM_TOKENS]
    runner = reference_runner(case, "float32")
    (logits,) = runner.step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) <= 1e-4
    for name, (of, edit_tensors) in FORMAT_MUTATIONS.items():
        if of == case:
            change_stored(runner, case, "float32", edit_tensors)
            (logits,) = runner.step([prompt], NUM_TOKENS)
            assert relative_error(logits, fixture.logits[: len(prompt)]) > MUST_EXCEED, name


def test_another_zero_of_int4_is_noticed(monkeypatch: pytest.MonkeyPatch):
    values = dict(reference._NIBBLE_VALUES) | {"int4_g32": np.arange(-7, 9).astype(np.float32)}
    monkeypatch.setattr(reference, "_NIBBLE_VALUES", values)
    fixture = load_fixture("kimi_k2_int4")
    prompt = fixture.prompts[0][:NUM_TOKENS]
    (logits,) = reference_runner("kimi_k2_int4", "float32").step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) > MUST_EXCEED


def test_without_mutation_the_same_comparison_holds():
    fixture = load_fixture("deepseek_v3")
    prompt = fixture.prompts[0][:NUM_TOKENS]
    (logits,) = reference_runner("deepseek_v3", "float32").step([prompt], NUM_TOKENS)
    assert relative_error(logits, fixture.logits[: len(prompt)]) <= 1e-4
    assert np.isfinite(logits).all()
