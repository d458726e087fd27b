"""The engine on a real GPU, held to the engine on the CPU. Run by tools/gpu_check."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import support.every_expert
from support import tiny_models

from jaxmoe import LLM, SamplingParams

pytestmark = pytest.mark.gpu
CASES = [
    *("deepseek_v3", "deepseek_v3_fp8", "qwen3_moe_fp8", "gpt_oss", "glm4_moe_lite"),
    *("kimi_k2_int4", "gpt_oss_mxfp4"),
]


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_models.write_checkpoint(path, request.param)
    return path


@pytest.fixture(scope="module")
def every_expert(folder, tmp_path_factory):
    return support.every_expert.copy(folder, tmp_path_factory.mktemp("every_expert"))


def _llm(folder, device: str, prefill: str = "chunked") -> LLM:
    return LLM(
        str(folder),
        device=device,
        prefill=prefill,
        max_num_seqs=4,
        max_model_len=128,
        prefill_chunk_tokens=32,
        num_threads=4,
        cache_dir="",
        show_progress=False,
    )


PROMPTS = [np.random.default_rng(n).integers(1, 60, n).tolist() for n in (1, 17, 60)]


@pytest.mark.parametrize("prefill", ["chunked", "slp"])
def test_logits_are_those_of_the_cpu(every_expert, prefill):
    with _llm(every_expert, "cpu") as cpu, _llm(every_expert, "gpu", prefill) as gpu:
        assert jax.devices()[0].platform == "gpu"
        for prompt in PROMPTS:
            want, got = cpu.logits(prompt), gpu.logits(prompt)
            error = np.abs(got - want).max(axis=-1) / np.abs(want).max()
            assert error.max() < 4e-2, error


@pytest.mark.parametrize("prefill", ["chunked", "slp"])
def test_texts_do_not_depend_on_what_runs_beside_them(folder, prefill):
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)
    with _llm(folder, "gpu", prefill) as gpu:
        alone = [gpu.generate(p, params)[0].outputs[0] for p in PROMPTS]
        together = [o.outputs[0] for o in gpu.generate(PROMPTS, params)]
    assert [o.token_ids for o in alone] == [o.token_ids for o in together]
