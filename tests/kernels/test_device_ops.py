"""Whole tiny models on the GPU operations, interpreted, against the reference operations."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny_runner

slow = pytest.mark.slow  # interpreted kernels take long to compile


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param("qwen3_moe", "decode", marks=slow),
        pytest.param("qwen3_moe", "prefill", marks=slow),
        pytest.param("deepseek_v3", "decode", marks=slow),
        pytest.param("deepseek_v3", "prefill", marks=slow),
        pytest.param("gpt_oss", "decode", marks=slow),
        pytest.param("gpt_oss", "prefill", marks=slow),
    ],
)
def test_rows_of_a_step(case: str, kind: str):
    reference = tiny_runner.reference_runner(case, "float32")
    device = tiny_runner.device_runner(case, "float32", kind)
    rng = np.random.default_rng(3)
    for counts in [(5, 9, 1), (1, 1, 1)]:
        tokens = [rng.integers(1, 90, n).tolist() for n in counts]
        want = reference.step(tokens, 16)
        for w, g in zip(want, device.step(tokens, 16), strict=True):
            np.testing.assert_allclose(g, w, atol=2e-4 * float(np.abs(w).max()))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["deepseek_v3"])
def test_a_prompt_in_chunks_with_expanded_latents(case: str):
    reference = tiny_runner.reference_runner(case, "float32")
    device = tiny_runner.device_runner(case, "float32", "prefill", one_sequence=True)
    rng = np.random.default_rng(4)
    for count in (33, 20):
        tokens = rng.integers(1, 90, count).tolist()
        want = reference.step([tokens, [], []], 40)[0]
        got = device.step([tokens], 40)[0]
        np.testing.assert_allclose(got, want, atol=2e-4 * float(np.abs(want).max()))
