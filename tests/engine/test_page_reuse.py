"""What a finished request leaves in the KV cache reaches nobody: pages are filled with NaN between
requests, and a later one, which gets the same pages, says what it says in a fresh engine.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_models

from jaxmoe import LLM, SamplingParams

OPTIONS = {
    "max_num_seqs": 4,
    "max_model_len": 64,
    "prefill_chunk_tokens": 16,
    "page_size": 8,
    "num_threads": 2,
    "cache_dir": "",
    "show_progress": False,
    "prefix_cache": False,
}
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)


def _poison(llm: LLM) -> None:
    """Every page of every layer; nobody holds any."""
    engine = llm.engine
    assert engine.pages.num_free == engine.layout.num_pages

    def canary(array: jax.Array) -> jax.Array:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        return jax.device_put(jnp.full(array.shape, jnp.nan, array.dtype), array.sharding)

    assert llm._started is not None
    caches = llm._started.step.caches
    caches[:] = [tuple(canary(array) for array in layer) for layer in caches]


# Grouped keys with a window, latent keys, keys of an indexer beside them.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        "deepseek_v3_fp8",
        pytest.param("deepseek_v32_sparse", marks=pytest.mark.slow),
    ],
)
def test_pages_of_others_reach_nobody(case, tmp_path):
    tiny_models.write_checkpoint(tmp_path, case)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 60, n).tolist() for n in (3, 8, 21, 40)]
    with LLM(str(tmp_path), **OPTIONS) as llm:
        alone = [llm.generate(p, PARAMS)[0].outputs[0] for p in prompts]
        for prompt, want in zip(prompts, alone, strict=True):
            _poison(llm)
            got = llm.generate(prompt, PARAMS)[0].outputs[0]
            assert got.token_ids == want.token_ids
            assert got.logprobs == want.logprobs
            assert llm._started is not None
            first = llm._started.step.caches[0][0]
            assert jnp.isnan(first).any() and not jnp.isnan(first).all()  # these were the pages
