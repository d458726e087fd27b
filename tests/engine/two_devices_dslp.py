"""Prompts that two CPU devices compute together, in an engine.

Collected by tests/prefill/test_dslp.py only, in a process with two devices.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
from support import tiny_models

from jaxmoe import LLM
from jaxmoe.common.errors import ConfigError
from jaxmoe.sampling_params import SamplingParams


def make(folder, prefill, **more) -> LLM:
    options = {
        "device": "cpu",
        "compute_dtype": "float32",
        "max_num_seqs": 2,
        "max_model_len": 96,
        "num_threads": 1,
        "show_progress": False,
    }
    return LLM(str(folder), prefill=prefill, **options, **more)


@pytest.mark.parametrize(
    "case", ["deepseek_v3_fp8", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_texts_are_those_of_chunks(case, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tiny_models.write_checkpoint(tmp_path, case)
    prompts = [np.random.default_rng(n).integers(1, 60, n).tolist() for n in (1, 2, 70)]
    # Goes on from what the third has left in the prefix cache.
    prompts.append(prompts[2][:48] + prompts[2][:9])
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, repetition_penalty=1.2)
    texts = {}
    for prefill in ("chunked", "dslp"):
        with make(tmp_path, prefill) as llm:
            texts[prefill] = [llm.generate([p], params)[0].outputs[0].token_ids for p in prompts]
    assert caplog.text.count("prompt tokens by dslp, predicted") == 3
    assert "8 prompt tokens by dslp" in caplog.text
    assert "on 2 devices, each with its share of the experts" in caplog.text
    assert texts["dslp"] == texts["chunked"]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("qwen3_next", "Qwen3Next.*recurrent layers"),
        ("deepseek_v32_fp8", "DeepseekV32.*choose among all positions"),
    ],
)
def test_models_that_cannot_are_refused_by_name(tmp_path, case, why):
    tiny_models.write_checkpoint(tmp_path, case)
    with pytest.raises(ConfigError, match=f"dslp, but {why}.*prefill=slp"):
        make(tmp_path, "dslp")
