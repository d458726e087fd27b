"""Our logits against Hugging Face transformers', on tiny checkpoints of every family and format.

The fixtures hold transformers' float32 run (on exactly dequantized weights) and its bfloat16 run.
In float32 our error may be 1e-4 of the range of logits; in bfloat16 our distributions must be no
farther from the float32 ones (KL, mean over all positions of three prompts: 112, and 402 where
entries are compressed) than transformers' own, and at most twice as far where an indexer chooses.
The prompts were grown so that no routing decision in them, and no choice of an indexer's, is within
0.05 of a router logit of another one (DeepSeek-V4, whose prompts are long and whose tokens decide
in many places: 0.01): what is compared is rounding, not the luck of near ties.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import parity_tables, tiny_models
from support.compare import mean_kl, relative_error
from support.parity import load_fixture
from support.tiny_runner import TinyRunner, native_runner, reference_runner

FLOAT32_TOLERANCE = 1e-4
# Two ways through the same arithmetic, in float32: only the order of additions may differ.
SAME_TOLERANCE = 2e-5
PREFILL_TOKENS = (128, 416)  # the least that holds all prompts in one step, and some padding
CHUNK_TOKENS = 16  # also the decode steps: three tokens and padding
BACKENDS = ("reference", "native")


def make_runner(backend: str, case: str, dtype: str, folder: Path, family: str) -> TinyRunner:
    if backend == "reference":
        return reference_runner(case, dtype)
    if importlib.util.find_spec("jaxmoe.ffi._native") is None:
        pytest.skip("the extension is not built")
    return native_runner(case, dtype, folder / case, family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


# Cases whose modules other cases run too: the kernels in float32 hold them to the reference in the
# ordinary run, everything else is for the slow one.
ALIKE = (
    *("mixtral", "olmoe", "glm4_moe_lite", "minimax_m2_fp8", "kimi_k25"),
    *("deepseek_v32_fp8", "glm_moe_dsa", "glm_moe_dsa_sparse", "glm_moe_dsa_shared"),
)
# Other formats of the models above, one case a format or spelling of it.
OTHER_FORMATS = (
    *("glm4_moe_fp8", "kimi_k2_int4", "gpt_oss_mxfp4", "deepseek_v31_fp8", "qwen3_moe_mxfp4"),
    *("qwen3_moe_int4", "minimax_m2_mxfp8", "qwen3_moe_awq", "qwen3_moe_gptq"),
    *("qwen3_moe_nvfp4", "deepseek_v3_nvfp4", "glm4_moe_int4"),
)
LONG = ("deepseek_v4",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow] if c in tiny_models.COMBINED else [])
        for c in tiny_models.CASES
    ],
)
def test_checkpoints_are_the_ones_the_fixtures_were_made_of(case: str):
    assert tiny_models.digest(tiny_models.make_tensors(case)) == load_fixture(case).digest


def float32_runs() -> list[Any]:
    # What the reference computes with others' modules, or their modules on another format; and
    # mutations run on it.
    on_kernels = (
        *(*ALIKE, *OTHER_FORMATS, *LONG, "deepseek_v32_sparse", "deepseek_v2_lite", "deepseek_v3"),
        *("kimi_k2", "kimi_k2_fp8", "qwen3_next_fp8", "qwen3_5_moe", "qwen3_5_moe_fp8"),
    )

    def is_slow(case: str, backend: str) -> bool:
        on_reference = backend == "reference" and case in on_kernels
        return case == "minimax_m2" or case in tiny_models.COMBINED or on_reference

    return runs(is_slow)


def runs(is_slow: Callable[[str, str], bool]) -> list[Any]:
    """Every case on both backends, some of them marked slow."""
    return [
        pytest.param(case, backend, marks=[pytest.mark.slow] if is_slow(case, backend) else [])
        for case in tiny_models.CASES
        for backend in BACKENDS
    ]


@pytest.mark.parametrize(("case", "backend"), float32_runs())
def test_float32(case: str, backend: str, folder: Path):
    """Prefill in one step, prefill in chunks, then 16 greedy steps of all sequences together."""
    fixture = load_fixture(case)
    runner = make_runner(backend, case, "float32", folder, "vector")
    whole = np.concatenate(runner.step(fixture.prompts, prefill_tokens(fixture.prompts)))
    assert relative_error(whole, fixture.logits) <= FLOAT32_TOLERANCE

    runner.reset()
    chunked = np.concatenate(prefill_in_chunks(runner, fixture.prompts))
    assert relative_error(chunked, whole) <= SAME_TOLERANCE

    last = np.cumsum([len(p) for p in fixture.prompts]) - 1
    rows = [chunked[last]]
    for i in range(fixture.greedy_tokens.shape[1] - 1):
        teacher = [[int(token)] for token in fixture.greedy_tokens[:, i]]
        rows.append(np.concatenate(runner.step(teacher, CHUNK_TOKENS)))
    decoded = np.stack(rows, axis=1)  # [P, 16, V]
    assert relative_error(decoded, fixture.greedy_logits) <= FLOAT32_TOLERANCE
    np.testing.assert_array_equal(decoded.argmax(axis=-1), fixture.greedy_tokens)
    if backend == "native":
        parity_tables.note(case, float32_error=relative_error(whole, fixture.logits))


def bfloat16_runs() -> list[Any]:
    """On the reference, which is slow, one of each kind of model."""
    ordinary = ("deepseek_v2", "deepseek_v3_fp8", "qwen3_moe_fp8")
    like_float32 = (
        *("deepseek_v31_fp8", "qwen3_moe_int4", "qwen3_moe_mxfp4", "qwen3_moe_gptq"),
        *("deepseek_v3_nvfp4", "glm4_moe_int4", *tiny_models.COMBINED),
    )

    def is_slow(case: str, backend: str) -> bool:
        if backend == "reference":
            return case not in ordinary
        is_alike = case in (*ALIKE, *like_float32) and case != "minimax_m2_fp8"
        return case == "minimax_m2" or is_alike or case in LONG

    return runs(is_slow)


@pytest.mark.parametrize(("case", "backend"), bfloat16_runs())
def test_bfloat16(case: str, backend: str, folder: Path):
    fixture = load_fixture(case)
    runner = make_runner(backend, case, "bfloat16", folder, "matrix")
    logits = np.concatenate(runner.step(fixture.prompts, prefill_tokens(fixture.prompts)))
    ours, theirs = (mean_kl(a, fixture.logits) for a in (logits, fixture.logits_bf16))
    # Rounding flips a few of an indexer's choices, whatever their margins in float32; how many is
    # luck, and outweighs the rest.
    chooses = case.endswith(("_sparse", "_shared")) or case == "deepseek_v4"
    assert ours <= theirs * (2.0 if chooses else 1.0)
    # A bfloat16 run that agreed to float32 precision would not have been one.
    assert relative_error(logits, fixture.logits) > 1e-4
    if backend == "native":
        parity_tables.note(case, bfloat16_kl=ours, transformers_kl=theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_decode_agrees_with_prefill(backend: str, folder: Path):
    """Distributions of small steps, with decode's kernels, are as close to the reference as a
    whole prefill's.
    """
    fixture = load_fixture("deepseek_v3_fp8")
    runner = make_runner(backend, "deepseek_v3_fp8", "bfloat16", folder, "vector")
    logits = np.concatenate(prefill_in_chunks(runner, fixture.prompts))
    assert mean_kl(logits, fixture.logits) <= mean_kl(fixture.logits_bf16, fixture.logits)


def prefill_tokens(prompts: list[list[int]]) -> int:
    return next(size for size in PREFILL_TOKENS if size >= sum(map(len, prompts)))


def prefill_in_chunks(runner: TinyRunner, prompts: list[list[int]]) -> list[np.ndarray]:
    """Steps that mix the prompts: each takes a part of one or two of them."""
    parts: list[list[np.ndarray]] = [[] for _ in prompts]
    taken = [0] * len(prompts)
    turn = 0
    while any(t < len(p) for t, p in zip(taken, prompts, strict=True)):
        room = CHUNK_TOKENS
        chunk: list[list[int]] = [[] for _ in prompts]
        for r in (turn % len(prompts), (turn + 1) % len(prompts)):
            size = min(room, 11, len(prompts[r]) - taken[r])
            chunk[r] = prompts[r][taken[r] : taken[r] + size]
            taken[r] += size
            room -= size
        for part, rows in zip(parts, runner.step(chunk, CHUNK_TOKENS), strict=True):
            part.append(rows)
        turn += 1
    return [np.concatenate(part) for part in parts]
