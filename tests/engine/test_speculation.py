"""Speculative decoding with a draft head: the same answers as without, whatever is asked beside."""

import json
import random

import pytest
from support import draft_models, tiny_models

from jaxmoe import LLM, EngineConfig, SamplingParams
from jaxmoe.common.errors import ConfigError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.plan import make_plan
from jaxmoe.models import registry
from jaxmoe.weights.convert import convert
from jaxmoe.weights.safetensors_reader import Checkpoint

# Of what layers add: so that some six of ten guesses are right.
SHARE = 0.08
OPTIONS = dict(
    max_model_len=64, prefill_chunk_tokens=16, page_size=4, num_threads=2, show_progress=False
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return draft_models.write_checkpoint(tmp_path_factory.mktemp("draft") / "model", SHARE)


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Without the head, one sequence at a time."""
    with LLM(model=checkpoint, **OPTIONS, max_num_seqs=1, prefix_cache=False) as llm:
        yield llm


# Three take twice the programs; tests/decode/test_drafting.py has such in the ordinary run.
@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)])
def guessing(checkpoint, request):
    options = OPTIONS | dict(max_num_seqs=2, speculative="mtp", max_draft_tokens=request.param)
    with LLM(model=checkpoint, **options) as llm:
        yield llm


def requests(rng, count):
    beginnings = [[rng.randrange(2, 500) for _ in range(20)] for _ in range(2)]
    for i in range(count):
        ids = rng.choice(beginnings)[: rng.randrange(1, 20)] + [rng.randrange(2, 500)]
        yield (
            ids,
            SamplingParams(
                temperature=rng.choice([0, 0, 0.7]),
                seed=i,
                max_tokens=rng.choice([1, 8, 32, 40]),
                ignore_eos=True,
                stop_token_ids=rng.choice([(), (), tuple(range(0, 512, 16))]),
                logprobs=rng.choice([None, 1]),
            ),
        )


def facts(output):
    return [(o.token_ids, o.logprobs, o.finish_reason) for o in output.outputs]


def test_answers_are_the_same_in_any_mix(plain, guessing):
    rng, engine = random.Random(0), guessing.engine
    asked = list(requests(rng, 16))
    alone = [facts(plain.generate([ids], params)[0]) for ids, params in asked]
    held = engine.pages.allocate(engine.pages.num_free - 16)  # so that some have to give way
    waiting, outputs, seqs = list(range(len(asked))), {}, []
    aborted = {3, 9}
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            i = waiting.pop(0)
            engine.add_request(*asked[i], request_id=str(i))
            seqs.append(engine.scheduler.waiting[-1])
        if rng.random() < 0.1:
            engine.abort(str(rng.choice(sorted(aborted))))
        for delta in engine.step():
            if delta.output is not None:
                outputs[int(delta.request_id)] = delta.output
    engine.pages.free(held)
    assert engine.pages.num_free == engine.pages.num_pages
    for i, output in outputs.items():
        if output.outputs[0].finish_reason != "abort":
            assert facts(output) == alone[i], i
    assert len(outputs) >= len(asked) - len(aborted)
    stats = engine.stats()
    assert sum(s.num_preemptions for s in seqs) > 0
    assert stats["prefix_cache_hit_tokens_total"] > 0
    verified, right = stats["draft_tokens_total"], stats["draft_tokens_accepted_total"]
    assert 0.3 * verified < right < 0.95 * verified, "no mix of right and wrong guesses"
    assert 0 < stats["draft_acceptance_rate"] < 1


@pytest.mark.slow  # further programs; test_random_mixes.py has such requests too
def test_who_is_under_penalties_is_not_guessed_and_named(plain, guessing):
    before = guessing.engine.stats()
    params = SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.3, ignore_eos=True)
    expected = plain.generate([[5, 6, 7]], params)[0]
    assert facts(guessing.generate([[5, 6, 7]], params)[0]) == facts(expected)
    after = guessing.engine.stats()
    name = 'undrafted_tokens_total{reason="adjusted_logits"}'
    assert after[name] - before[name] == 7
    assert after["draft_tokens_total"] == before["draft_tokens_total"]


def test_guesses_save_steps(guessing):
    before = guessing.engine.stats()
    params = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    (output,) = guessing.generate([[7, 8, 9]], params)
    after = guessing.engine.stats()
    steps = 'steps_total{kind="decode"}'
    right = "draft_tokens_accepted_total"
    assert len(output.outputs[0].token_ids) == 33
    assert after[steps] - before[steps] == 32 - (after[right] - before[right]) < 32


def test_all_guesses_are_right_where_the_head_is_the_model(tmp_path):
    """Layers that add nothing leave a text in which each token says the next."""
    model = draft_models.write_checkpoint(tmp_path / "model", 0.0)
    options = OPTIONS | dict(max_num_seqs=1, speculative="mtp", max_draft_tokens=3)
    with LLM(model=model, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        tokens = llm.generate([[7, 8, 9]], params)[0].outputs[0].token_ids
        stats = llm.engine.stats()
    following = dict(zip(tokens, tokens[1:], strict=False))
    assert all(following[a] == b for a, b in zip(tokens, tokens[1:], strict=False))
    # Three tokens in the first, for the prompt's page ends there, and four in each that follows.
    assert stats['steps_total{kind="decode"}'] == 8
    assert stats["draft_tokens_accepted_total"] == stats["draft_tokens_total"] == 23


def test_the_report_says_what_a_guess_costs(plain, guessing):
    assert "speculative decoding: always, up to " in guessing.report
    assert "so it pays from" in guessing.report
    assert "speculative decoding: off; the checkpoint may have a draft head" in plain.report


def test_the_plan_counts_the_head_only_where_it_is_run(checkpoint):
    sizes = {}
    for speculative in ("off", "mtp"):
        plan = make_plan(EngineConfig(model=str(checkpoint), speculative=speculative, **OPTIONS))
        sizes[speculative] = {item.name: item.nbytes for item in plan.items}
    off, on = sizes["off"], sizes["mtp"]
    # One of two layers has routed experts, and the head's has.
    assert on["routed experts"] == 2 * off["routed experts"]
    assert on["other weights"] > off["other weights"]
    assert on["KV cache"] == 3 * off["KV cache"] // 2


@pytest.mark.parametrize(
    ("case", "changes", "options", "problem"),
    [
        ("qwen3_next", {}, {}, "recurrent states cannot be taken back"),
        ("qwen3_moe", {}, {}, "config.json names no draft head"),
        ("deepseek_v32_fp8", {}, {}, "attention has an indexer"),
        ("minimax_m2", {}, {}, "MiniMaxM2ForCausalLM are not supported"),
        ("deepseek_v3", {}, {"prefill": "slp"}, "prefill=slp leave its cache empty"),
        ("deepseek_v3", {}, {"disaggregate": "on"}, "disaggregate=on"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, case, changes, options, problem):
    config = tiny_models.hf_config(case) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"model": str(tmp_path), "load_format": "dummy", **options}
    with pytest.raises(ConfigError, match=problem):
        make_plan(EngineConfig(speculative="mtp", **options))
    plan = make_plan(EngineConfig(speculative="auto", **options))
    assert any(problem in note for note in plan.notes)


def test_a_checkpoint_without_the_heads_tensors_is_refused(tmp_path, checkpoint):
    tensors = draft_models.make_tensors()
    (tmp_path / "config.json").write_text(json.dumps(draft_models.hf_config()))
    rest = {n: a for n, a in tensors.items() if not n.startswith(draft_models.DRAFT + ".")}
    tiny_models.write_safetensors(tmp_path / "model.safetensors", rest)
    with pytest.raises(ConfigError, match=r"no tensor 'model.layers.2.eh_proj.weight'"):
        make_plan(EngineConfig(model=str(tmp_path), speculative="mtp"))


def test_a_prepared_checkpoint_says_that_it_holds_none(tmp_path, checkpoint):
    with Checkpoint.open(checkpoint) as source:
        convert(source, ModelConfig.from_hf(source.config()), registry, tmp_path / "prepared")
    options = OPTIONS | {"model": str(tmp_path / "prepared")}
    with pytest.raises(ConfigError, match="prepared checkpoints hold no draft head"):
        make_plan(EngineConfig(speculative="mtp", **options))
    plan = make_plan(EngineConfig(speculative="auto", **options))
    assert any("prepared checkpoints hold no draft head" in note for note in plan.notes)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["glm4_moe_fp8", "deepseek_v31_fp8", "glm4_moe_lite"])
def test_heads_of_other_families_and_formats_change_no_token(tmp_path, case):
    tiny_models.write_checkpoint(tmp_path, case)
    prompts = [[7, 8, 9], [3, 1, 4, 1, 5, 9, 2, 6]]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    answers = {}
    for speculative in ("off", "mtp"):
        options = OPTIONS | dict(max_num_seqs=2, speculative=speculative, max_draft_tokens=2)
        with LLM(model=str(tmp_path), **options) as llm:
            answers[speculative] = [facts(output) for output in llm.generate(prompts, params)]
            verified = llm.engine.stats()["draft_tokens_total"]
    assert answers["mtp"] == answers["off"]
    assert verified > 20
