"""Prompts that two CPU devices compute together, in an engine.

Collected by tests/prefill/test_dslp.py only, in a process with two devices.
"""

from __future__ import annotations

import gc
import logging
import re

import jax
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


def texts_of(llm, prompts, params) -> list[tuple[int, ...]]:
    """One after the other."""
    return [llm.generate([p], params)[0].outputs[0].token_ids for p in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe"])
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
            texts[prefill] = texts_of(llm, prompts, params)
    assert caplog.text.count("prompt tokens by dslp, predicted") == 3
    assert "8 prompt tokens by dslp" in caplog.text
    assert texts["dslp"] == texts["chunked"]


def test_one_way_may_be_asked_for(tmp_path):
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    with make(tmp_path, "dslp") as llm:
        assert "long prompts: on 2 devices, each with its share of the experts" in llm.report
        assert "prompts: always dslp" in llm.report
        assert llm._started.long_prompts.route.next_pass(1) == ("dslp", 1)


def on_device(device, arrays=None) -> dict[int, int]:
    """Bytes by address of those of the arrays that are there; default: of all."""
    if arrays is None:
        gc.collect()
        arrays = jax.live_arrays()
    arrays = [a for a in arrays if a.devices() == {device}]
    return {a.unsafe_buffer_pointer(): a.nbytes for a in arrays}


@pytest.mark.parametrize(
    "case", ["deepseek_v3_fp8", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_auto_chooses_one_device_or_both_for_every_prompt(case, tmp_path, caplog):
    """The texts are those of chunks whichever it is, also after what another way has left in the
    prefix cache; one memory of slots serves both ways.
    """
    caplog.set_level(logging.INFO)
    tiny_models.write_checkpoint(tmp_path, case)
    prompts = [np.random.default_rng(n).integers(1, 60, n).tolist() for n in (70, 8, 41)]
    # What is left to compute counts: one device is enough for the first, a chunk for the second.
    prompts += [prompts[0][:48] + prompts[0][:40], prompts[0][:48] + prompts[2][:6]]
    ways = ["dslp", "chunked", "slp", "slp", "chunked"]
    # And on from both.
    prompts.append(prompts[2][:32] + prompts[0][:60])
    ways.append("dslp")
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, repetition_penalty=1.2)
    with make(tmp_path, "chunked") as llm:
        want = texts_of(llm, prompts, params)
    home = jax.local_devices(backend="cpu")[0]
    before = on_device(home)
    with make(tmp_path, "auto", stand_in_copy_gb_s=50.0) as llm:
        long_prompts = llm._started.long_prompts
        route, (ring, _), (rings, _) = long_prompts.route, *long_prompts.rings
        assert route.paths == ("chunked", "slp", "dslp")
        slots = on_device(home, (a for slot in ring.ring.slots for a in slot))
        assert set(on_device(home, (a for slot in rings.rings[0].slots for a in slot))) <= set(
            slots
        )
        # Beside the weights and the pages there is one ring and nothing else.
        started = llm._started
        others = [*started.loaded.leaves, *(a for arrays in started.step.caches for a in arrays)]
        new = {at: size for at, size in on_device(home).items() if at not in before}
        extra = sum(new.values()) - sum((slots | on_device(home, others)).values())
        assert 0 <= extra < min(slots.values()), (extra, slots)
        # By hand: chunks below 10 tokens, both devices from 50.
        route.chunked_token_s, route.pass_s, route.streamed_token_s = 0.1, 1.0, 0.05
        route.dslp.pass_s, route.dslp.token_s = 2.5, 1e-3
        route.observe = lambda path, tokens, seconds: None
        assert texts_of(llm, prompts, params) == want
    lines = [line for line in caplog.messages if " tokens, ttft" in line][-len(ways) :]
    assert [re.search(r"\((\w+), predicted", line)[1] for line in lines] == ways


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
