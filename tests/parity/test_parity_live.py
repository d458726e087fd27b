"""Runs transformers again, against the committed fixtures, so that they cannot drift."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models
from support.compare import mean_kl, relative_error
from support.parity import load_fixture

TOOL = Path(__file__).parents[2] / "tools" / "make_parity_fixtures.py"


@pytest.mark.parity_live
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("case", tiny_models.CASES)
def test_transformers_still_says_the_same(case: str):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_parity_fixtures", TOOL)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    fixture = load_fixture(case)
    again = tool.compute(case, fixture.prompts)
    assert str(again["digest"]) == fixture.digest
    assert relative_error(again["logits"], fixture.logits) <= 1e-5
    assert relative_error(again["greedy_logits"], fixture.greedy_logits) <= 1e-5
    np.testing.assert_array_equal(again["greedy_tokens"], fixture.greedy_tokens)
    # bfloat16 sums in another order on another machine; its distance from float32 stays what it is.
    bits = np.ascontiguousarray(again["logits_bf16_bits"])
    again_bf16 = (bits.astype(np.uint32) << 16).view(np.float32)
    ratio = mean_kl(again_bf16, fixture.logits) / mean_kl(fixture.logits_bf16, fixture.logits)
    assert 0.5 <= ratio <= 2.0
