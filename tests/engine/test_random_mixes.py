"""Random mixes of requests on the step computable by hand: whatever comes, goes, is preempted,
found in the prefix cache or asked again of a restarted engine, every request's answer is the one it
gets alone. tests/reliability (R12) does the same to a real server.
"""

import hashlib
import random

import pytest
from support import fake_step

from jaxmoe.sampling_params import SamplingParams
from jaxmoe.scheduler.draft_policy import AlwaysDraft


def script(prompt: bytes) -> bytes:
    """A text of 0 to 30 letters that depends on every byte of the prompt."""
    digest = hashlib.sha256(prompt).digest()
    return bytes(97 + b % 4 for b in digest[: digest[31] % 31])


def requests(rng, count):
    """Prompts of few values, so that many begin alike."""
    beginnings = [bytes(rng.choice(b"xy") for _ in range(20)) for _ in range(3)]
    for i in range(count):
        prompt = rng.choice(beginnings)[: rng.randrange(21)]
        prompt += bytes(rng.choice(b"xy") for _ in range(rng.randrange(1, 6)))
        params = SamplingParams(
            temperature=0,
            n=rng.choice([1, 1, 1, 3]),
            max_tokens=rng.randrange(1, 40 - len(prompt) + 1),
            logprobs=rng.choice([None, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            stop=rng.choice([(), ("ab", "dd")]),
            ignore_eos=rng.random() < 0.3,
            frequency_penalty=rng.choice([0, 0, 0.5]),
        )
        yield str(i), prompt, params, rng.choice([None, None, "salt"])


def facts(output):
    """What must not depend on the mix."""
    plain = [
        (c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason, c.logprobs)
        for c in output.outputs
    ]
    return plain, output.prompt_logprobs


def alone(prompt, params):
    engine, _ = fake_step.make_engine(script, prefix_cache=False)
    engine.add_request(list(prompt), params, request_id="a")
    return facts(next(d.output for d in drain(engine) if d.output))


def drain(engine):
    while engine.has_work:
        yield from engine.step()


def mix(seed, *, count, prefix_cache, drafts=None):
    """Answers by request id; requests come, step and go as `seed` says."""
    rng = random.Random(seed)
    options = {"num_pages": rng.choice([10, 13, 40]), "max_num_seqs": rng.choice([1, 3, 5])}
    options["drafts"] = drafts
    engine, _ = fake_step.make_engine(script, prefix_cache=prefix_cache, **options)
    restart_at = rng.choice([None, rng.randrange(40)])
    waiting = list(requests(rng, count))
    asked = {i: (prompt, params) for i, prompt, params, _ in waiting}
    deltas, aborted, steps = [], set(), 0
    while waiting or engine.has_work:
        steps += 1
        if steps == restart_at:
            # What was in flight is lost, and asked again.
            ended = {d.request_id for d in deltas if d.output is not None} | aborted
            lost = asked.keys() - ended - {i for i, *_ in waiting}
            deltas = [d for d in deltas if d.request_id not in lost]
            engine, _ = fake_step.make_engine(script, prefix_cache=prefix_cache, **options)
            waiting += [(i, *asked[i], None) for i in sorted(lost)]
        if waiting and rng.random() < 0.5:
            request_id, prompt, params, salt = waiting.pop(0)
            engine.add_request(list(prompt), params, request_id=request_id, cache_salt=salt)
        if rng.random() < 0.03 and asked.keys() - aborted:
            request_id = rng.choice(sorted(asked))
            last = engine.abort(request_id)
            if last:
                aborted.add(request_id)
                assert {d.finish_reason for d in last} == {"abort"}
                assert [d.output is not None for d in last] == [False] * (len(last) - 1) + [True]
        deltas += engine.step()
        engine.pages.check()
    assert engine.pages.num_free == engine.layout.num_pages
    outputs = {d.request_id: d.output for d in deltas if d.output is not None}
    assert outputs.keys() == asked.keys() - aborted
    return {i: (*asked[i], facts(output)) for i, output in outputs.items()}, engine


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_answer_is_the_one_given_alone(seed, prefix_cache):
    answers, engine = mix(seed, count=12, prefix_cache=prefix_cache)
    for prompt, params, got in answers.values():
        assert got == alone(prompt, params)
    stats = engine.stats()
    assert (stats["prefix_cache_hit_tokens_total"] > 0) <= prefix_cache
    assert stats["requests_running"] == stats["requests_waiting"] == stats["kv_pages_used"] == 0


class AnyNumber(AlwaysDraft):
    """As many guesses as it comes."""

    def __init__(self, rng, most_guesses):
        super().__init__(most_guesses)
        self.rng = rng

    def choose(self, num_sequences):
        return self.rng.randrange(self.most_guesses + 1)


@pytest.mark.parametrize("seed", range(60))
def test_answers_are_the_same_where_guesses_are_verified(seed):
    drafts = AnyNumber(random.Random(seed), 1 + seed % 3)
    answers, engine = mix(seed, count=12, prefix_cache=seed % 2 == 0, drafts=drafts)
    for prompt, params, got in answers.values():
        assert got == alone(prompt, params)
    assert engine.stats()["kv_pages_used"] == 0


def test_the_mixes_with_guesses_meet_right_and_wrong_ones():
    totals = {}
    for seed in range(20):
        _, engine = mix(seed, count=12, prefix_cache=True, drafts=AlwaysDraft(2))
        for name, value in engine.stats().items():
            totals[name] = totals.get(name, 0) + value
    assert 500 < totals["draft_tokens_accepted_total"] < 0.9 * totals["draft_tokens_total"]
    assert totals["preemptions_total"] > 10
    assert totals['undrafted_tokens_total{reason="adjusted_logits"}'] > 100


def test_the_mixes_meet_what_they_are_for():
    """Hits, preemptions and evictions happen, or the test above proves nothing."""
    totals = {}
    for seed in range(30):
        _, engine = mix(seed, count=12, prefix_cache=True)
        for name, value in engine.stats().items():
            totals[name] = totals.get(name, 0) + value
    assert totals["prefix_cache_hit_tokens_total"] > 1000
    assert totals["prefix_cache_evictions_total"] > 50
    assert totals["preemptions_total"] > 20
    assert totals['requests_total{finish_reason="abort"}'] > 5
