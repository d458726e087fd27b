"""Prompts that two GPUs compute together, held to the engine on the CPU."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from support import every_expert, tiny_models

from jaxmoe import LLM, SamplingParams

pytestmark = pytest.mark.two_gpus


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe_fp8", "gpt_oss"])
def test_first_tokens_are_those_of_the_cpu(case, tmp_path):
    assert len(jax.local_devices(backend="cuda")) >= 2
    tiny_models.write_checkpoint(tmp_path, case)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, 90, n).tolist() for n in (2, 17, 60, 120)]
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    texts = []
    for device, prefill in (("cpu", "chunked"), ("gpu", "dslp")):
        with LLM(
            str(tmp_path),
            device=device,
            prefill=prefill,
            max_model_len=128,
            num_threads=4,
            cache_dir="",
            show_progress=False,
        ) as llm:
            outputs = llm.generate(prompts, params)
            texts.append([o.outputs[0].token_ids for o in outputs])
    # BF16 activations: a near tie may fall the other way.
    same = [a == b for a, b in zip(*texts, strict=True)]
    assert sum(same) >= len(same) - 1, texts


@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3_fp8", "qwen3_moe_fp8", "gpt_oss"])
def test_logits_are_those_of_the_cpu(case, tmp_path):
    tiny_models.write_checkpoint(tmp_path / "model", case)
    every = every_expert.copy(tmp_path / "model", tmp_path / "every_expert")
    rng = np.random.default_rng(8)
    prompts = [rng.integers(1, 90, n).tolist() for n in (1, 17, 60, 120)]
    with _llm(every, "cpu") as cpu, _llm(every, "gpu", prefill="dslp") as gpus:
        for prompt in prompts:
            want, got = cpu.logits(prompt), gpus.logits(prompt)
            error = np.abs(got - want).max(axis=-1) / np.abs(want).max()
            assert error.max() < 4e-2, error


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe_fp8"])
def test_prompts_of_a_second_gpu_are_written_on_the_first(case, tmp_path):
    """Streamed by the GPU that decodes too, and by one of their own: the same programs."""
    tiny_models.write_checkpoint(tmp_path, case)
    rng = np.random.default_rng(9)
    prompts = [rng.integers(1, 90, n).tolist() for n in (5, 17, 60, 100)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    texts = []
    for more in ({"disaggregate": "off"}, {"disaggregate": "on"}):
        with _llm(tmp_path, "gpu", prefill="slp", **more) as llm:
            outputs = llm.generate(prompts, params)
            texts.append([o.outputs[0].token_ids for o in outputs])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe_fp8"])
def test_one_gpu_and_both_take_turns_out_of_one_ring(case, tmp_path):
    """What a way computes does not change after the other one has used its slots."""
    tiny_models.write_checkpoint(tmp_path, case)
    rng = np.random.default_rng(10)
    prompts = [rng.integers(1, 90, n).tolist() for n in (20, 110, 33, 60)]  # slp, dslp, slp, dslp
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with _llm(tmp_path, "cpu") as cpu:
        want = [cpu.generate(p, params)[0].outputs[0].token_ids for p in prompts]
    with _llm(tmp_path, "gpu", prefill="auto", prefix_cache=False) as llm:
        route = llm._started.long_prompts.route
        assert route.paths == ("chunked", "slp", "dslp"), llm.report
        # By hand: one GPU below 50 tokens, both from there on.
        route.chunked_token_s, route.pass_s, route.streamed_token_s = 1.0, 1.0, 0.05
        route.dslp.pass_s, route.dslp.token_s = 2.5, 1e-3
        route.observe = lambda path, tokens, seconds: None
        ways = [route.choose(len(p) - 1) for p in prompts]
        assert ways == ["slp", "dslp", "slp", "dslp"]
        texts = [
            [llm.generate(p, params)[0].outputs[0].token_ids for p in prompts] for _ in range(5)
        ]
    assert texts[1:] == texts[:-1]
    assert sum(a == b for a, b in zip(texts[0], want, strict=True)) >= len(want) - 1


def _llm(folder, device, **more):
    return LLM(
        str(folder),
        device=device,
        max_model_len=128,
        num_threads=4,
        cache_dir="",
        show_progress=False,
        **({"prefill": "chunked"} | more),
    )
