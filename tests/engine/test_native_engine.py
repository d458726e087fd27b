"""The whole engine on the CPU kernels: a request's tokens and log probabilities have the
same bits alone and in any mix, after preemption and in any chunking, and a step is compiled
once a shape.
"""

import dataclasses
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models, tiny_tokenizer

from jaxmoe import LLM, SamplingParams
from jaxmoe.common.errors import CapacityError, CheckpointError, ConfigError
from jaxmoe.weights import memory

# Kept between runs: compiling takes most of the time of these tests.
PROGRAMS = Path(__file__).parents[2] / "build" / "test_programs"
TEXT = "In the beginning God created the heaven and the earth. 你好世界 And the earth was void."


def write(path: Path, case: str) -> Path:
    tiny_models.write_checkpoint(path, case)
    tiny_tokenizer.write(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return path


# gpt-oss, below, has Qwen3-MoE's attention too.
@pytest.fixture(
    scope="module",
    params=["deepseek_v3_fp8", pytest.param("qwen3_moe", marks=pytest.mark.slow), "qwen3_next"],
)
def directory(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


def load(directory, **changes):
    options = dict(
        max_num_seqs=4,
        prefill_chunk_tokens=16,
        max_model_len=128,
        page_size=8,
        cache_dir=str(PROGRAMS),
        show_progress=False,
    )
    return LLM(directory, **(options | changes))


def results(outputs):
    return [(c.token_ids, [e.logprob for e in c.logprobs]) for o in outputs for c in o.outputs]


def test_same_bits_alone_and_in_any_mix_and_after_preemption(directory):
    rng = random.Random(0)
    prompts = [TEXT[: rng.randrange(1, len(TEXT))] for _ in range(8)]
    params = [
        SamplingParams(
            temperature=i % 2 * 0.8,
            seed=i,
            top_p=0.9,
            repetition_penalty=1.2 if i == 3 else 1.0,
            max_tokens=14,
            ignore_eos=True,
            logprobs=0,
        )
        for i in range(len(prompts))
    ]
    with load(directory) as llm:
        alone = [results(llm.generate(p, q))[0] for p, q in zip(prompts, params, strict=True)]
        orders = [list(range(8)), list(range(8))[::-1], rng.sample(range(8), 8)]
        for order in orders:
            mixed = llm.generate([prompts[i] for i in order], [params[i] for i in order])
            assert results(mixed) == [alone[i] for i in order]
        # The same prompts again found their pages; without them the bits are the same.
        assert llm.engine.prefix.hit_tokens > 300
        hits, llm.engine.scheduler.prefix = llm.engine.prefix.hit_tokens, None
        assert results(llm.generate(prompts, params)) == alone
        assert llm.engine.prefix.hit_tokens == hits
        llm.engine.scheduler.prefix = llm.engine.prefix
        # Every shape was compiled once: prefill of one row or four, decode of 1, 2 and 4 rows,
        # each with and without adjusted logits.
        assert llm._started.step.num_programs <= 10
        want = llm.logits(llm.prompt_ids(prompts[0]))
        _check_prompt_logprobs(llm, prompts[0], params[0], alone[0], want)
        # Hardly more pages than one sequence needs: the others are preempted and replayed.
        pages = llm.engine.pages
        held = pages.allocate(pages.num_free - 20)
        assert results(llm.generate(prompts, params)) == alone
        np.testing.assert_array_equal(llm.logits(llm.prompt_ids(prompts[0])), want)
        pages.free(held)
        assert pages.num_free == pages.num_pages


def _check_prompt_logprobs(llm, prompt, params, alone, logits):
    params = dataclasses.replace(params, prompt_logprobs=2)
    output = llm.generate(prompt, params)[0]
    assert results([output]) == [alone]
    for row, entry in zip(logits, output.prompt_logprobs[1:], strict=False):
        want = row - np.log(np.exp(row.astype(np.float64)).sum())
        np.testing.assert_allclose(entry.logprob, want[entry.token_id], rtol=1e-4, atol=1e-4)
        assert entry.top[0][0] == row.argmax()


@pytest.mark.parametrize("case", ["gpt_oss", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_same_bits_in_any_mix_with_windows_sinks_and_biases(tmp_path, case):
    prompts = [TEXT[: 3 + 20 * i] for i in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    with load(write(tmp_path, case)) as llm:
        alone = [results(llm.generate(p, params))[0] for p in prompts]
        assert results(llm.generate(prompts[::-1], params)) == alone[::-1]


def test_same_bits_where_an_indexer_chooses_the_context(tmp_path):
    """Its keys are in the same pages: found by the prefix cache, computed again after preemption.
    Contexts are on both sides of what it chooses, so that dense and sparse steps mix.
    """
    write(tmp_path, "deepseek_v32_fp8")
    config = json.loads((tmp_path / "config.json").read_text()) | {"index_topk": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    with load(tmp_path) as llm:
        ids = 3 * llm.prompt_ids(TEXT)
        prompts = [ids[:length] for length in (5, 20, 21, 41, 78)]
        alone = [results(llm.generate(p, params))[0] for p in prompts]
        assert results(llm.generate(prompts[::-1], params)) == alone[::-1]
        assert llm.engine.prefix.hit_tokens > 78
        llm.engine.scheduler.prefix = None
        pages = llm.engine.pages
        held = pages.allocate(pages.num_free - 13)
        assert results(llm.generate(prompts, params)) == alone
        assert llm.engine.stats()["preemptions_total"] > 0
        pages.free(held)


@pytest.mark.slow
def test_same_bits_where_entries_are_compressed(tmp_path):
    """Entries are in the pages, open ones in recurrent states: both are found by the prefix cache
    and computed again after preemption. Contexts are on both sides of the window, of the first
    entry of 128 positions and of the entries an indexer chooses.
    """
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=0)
    options = {"max_model_len": 160, "max_num_seqs": 2, "prefill_chunk_tokens": 64}
    with load(write(tmp_path, "deepseek_v4"), **options) as llm:
        ids = np.random.default_rng(0).integers(2, 64, 150).tolist()
        prompts = [ids[:length] for length in (5, 90, 122, 150)]
        alone = [results(llm.generate(p, params))[0] for p in prompts]
        assert results(llm.generate(prompts[::-1], params)) == alone[::-1]
        assert llm.engine.prefix.hit_tokens > 200
        llm.engine.scheduler.prefix = None
        pages = llm.engine.pages
        held = pages.allocate(pages.num_free - 29)  # both prompts fit, their answers do not
        assert results(llm.generate(prompts[1:3], params)) == alone[1:3]
        assert llm.engine.stats()["preemptions_total"] > 0
        pages.free(held)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"page_size": 6}, ["page_size: got 6", "multiple of 4"]),
        ({"prefill": "slp"}, ["DeepseekV4ForCausalLM", "open entries", "prefill=chunked"]),
    ],
)
def test_what_compressed_entries_do_not_go_with_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, "deepseek_v4"), **options)
    assert all(word in str(error.value) for word in words), error.value


def test_recurrent_states_are_reported_and_without_room_prompts_are_computed_whole(tmp_path):
    prompt, params = TEXT[:60], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    write(tmp_path, "qwen3_next")
    texts = []
    for options in ({}, {"state_cache_gb": 0}, {"state_cache_gb": 0, "prefix_cache": False}):
        with load(tmp_path, **options) as llm:
            texts += [llm.generate(prompt, params)[0].outputs[0].token_ids for _ in range(2)]
            kept, engine = "state_cache_gb" not in options, llm.engine
            assert (engine.prefix is not None) is kept
            hits = (len(llm.prompt_ids(prompt)) - 1) // 8 * 8
            assert not kept or engine.prefix.hit_tokens == hits > 0
            assert "recurrent states: 0.8 MiB each, 4 for running sequences and " in llm.report
            assert ("prefix cache off" in llm.report) is (options == {"state_cache_gb": 0})
    assert len(set(texts)) == 1


def test_the_start_up_report_says_what_runs_where(directory, caplog):
    with caplog.at_level(logging.INFO, "jaxmoe"):
        with load(directory, num_threads=1, isa="scalar") as llm:
            report = llm.report
    for words in (
        llm.model_config.architecture,
        "experts",
        "ISA scalar",
        "KV cache: 512 tokens in 64 pages",
        "decode: merged",
        "end of text",
        "note: instruction set forced to scalar",
        str(PROGRAMS),
    ):
        assert words in report, words
    logged = "\n".join(r.message for r in caplog.records)
    assert report in logged and "num_threads=1" in logged


def test_float32_and_bfloat16_agree_roughly_and_dummy_weights_run(directory):
    ids = [5, 6, 7]
    with load(directory) as llm, load(directory, compute_dtype="float32") as exact:
        a, b = llm.logits(ids), exact.logits(ids)
        assert a.dtype == b.dtype == np.float32 and not np.array_equal(a, b)
        assert np.abs(a - b).max() < 0.1 * np.ptp(b)
    with load(directory / "config.json", load_format="dummy") as llm:
        assert "random" in llm.report or "made in" in llm.report
        assert len(llm.generate("abc", SamplingParams(max_tokens=3, ignore_eos=True))[0].text) >= 0


def test_a_directory_without_a_tokenizer_takes_ids_only(tmp_path):
    write(tmp_path, "qwen3_moe")
    (tmp_path / "tokenizer.json").unlink()
    with load(tmp_path) as llm:
        assert "note: no known tokenizer" in llm.report
        out = llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))[0]
        assert out.text == "" and len(out.outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    "options,error,words",
    [
        (dict(max_model_len=4096), ConfigError, "max_model_len: got 4096.*end at 512"),
        (dict(max_model_len=500, kv_cache_gb=1e-6), ConfigError, "kv_cache_gb"),
        (dict(isa="amx", num_threads=1), ConfigError, "amx"),
        (
            dict(max_num_seqs=1024, page_size=1, max_model_len=512, kv_cache_gb=1024.0),
            CapacityError,
            "KV cache of 524288 tokens needs .*lower kv_cache_gb",
        ),
    ],
)
def test_refusals_before_weights_are_read(tmp_path, monkeypatch, options, error, words):
    if error is CapacityError:
        monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    write(tmp_path, "qwen3_moe")
    (tmp_path / "model.safetensors").unlink()
    if "isa" in options and "amx" in _isas():
        pytest.skip("this machine has AMX")
    with pytest.raises(error, match=words):
        load(tmp_path, **options)


def _isas():
    from jaxmoe.ffi.cpu_runtime import supported_isas

    return supported_isas()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no config.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: is not a directory"):
        load(tmp_path / "file")
    write(tmp_path, "qwen3_moe")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        load(tmp_path)
