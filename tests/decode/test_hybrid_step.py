"""The compiled step on a tiny model: its draws against the plain logits of the whole text."""

import dataclasses

import numpy as np
import pytest
from support import tiny_engine

from jaxmoe.decode.batch import StepRow, decode_size, prefill_size
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.sampling.inputs import RowSettings
from jaxmoe.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)
LAYOUT = CacheLayout(page_size=4, num_pages=40, max_model_len=48, token_bytes=1)


@pytest.fixture(scope="module")
def step():
    tiny = tiny_engine.model(tiny_engine.config())
    return tiny_engine.step(tiny, LAYOUT, num_slots=4, chunk_tokens=16)


def row(tokens, start, count, pages, slot, params=GREEDY, biases=None, num_prompt=1):
    settings = RowSettings(params, 0, 0, 0, 0, slot if biases is not None else -1, num_prompt)
    return StepRow(tokens[start : start + count], start, pages, slot, settings, biases)


def at(rows):
    """The rows with their logits read at the last token of each."""
    ends = np.cumsum([len(r.token_ids) for r in rows]) - 1
    return [
        dataclasses.replace(r, settings=dataclasses.replace(r.settings, logit_index=int(e)))
        for r, e in zip(rows, ends, strict=True)
    ]


def test_sizes():
    assert [decode_size(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    sized = [prefill_size(n, r, chunk=512, max_rows=8) for n, r in ((1, 1), (17, 2), (300, 1))]
    assert sized == [(16, 1), (64, 8), (512, 1)]
    assert prefill_size(100, 1, chunk=100, max_rows=3) == (100, 1)
    assert prefill_size(9, 2, chunk=16, max_rows=3) == (16, 4)
    rows = [prefill_size(400, r, chunk=512, max_rows=300)[1] for r in (1, 2, 9, 65, 300)]
    assert rows == [1, 8, 64, 300, 300]


def test_packed_prefill_and_decode_draw_what_the_whole_text_says(step):
    """Two sequences, chunked differently, in pages out of order, among rows of padding."""
    texts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8, 2, 8]]
    want = [step.logits(t, list(range(30, 38)), 3).argmax(-1) for t in texts]
    pages = [[9, 2, 17], [5, 11]]
    step.assign(0), step.assign(1)
    first = step.run(
        "prefill", at([row(texts[0], 0, 7, pages[0], 0), row(texts[1], 0, 3, pages[1], 1)])
    )
    assert [r.token_id for r in first] == [want[0][6], want[1][2]]
    for i in range(3):
        rows = at([row(texts[0], 7 + i, 1, pages[0], 0), row(texts[1], 3 + i, 1, pages[1], 1)])
        got = [r.token_id for r in step.run("decode", rows)]
        assert got == [want[0][7 + i], want[1][3 + i]]
    got = step.run("prefill", at([row(texts[0], 10, 1, pages[0], 0)]))
    assert got[0].token_id == want[0][10]


def test_logits_do_not_depend_on_chunks_or_pages(step):
    tokens = list(range(40))
    a = step.logits(tokens, list(range(10)), 0)
    b = step.logits(tokens, list(range(39, 29, -1)), 2)
    assert a.shape == (40, tiny_engine.config().vocab_size) and a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a[:7], step.logits(tokens[:7], [20, 21], 1), rtol=1e-4, atol=1e-4)


def test_biases_and_counts_reach_the_draw_and_are_forgotten_with_the_slot(step):
    tokens = [3, 1, 4]
    raw = step.logits(tokens, [0], 0)[-1]
    best, second = np.argsort(-raw)[:2]
    for _ in range(2):
        step.assign(0)
        rows = at([row(tokens, 0, 3, [0], 0, biases={int(best): -np.inf}, num_prompt=3)])
        assert step.run("prefill", rows)[0].token_id == second
    # A heavy penalty on everything written: the token that was fed as output is not drawn again.
    strong = SamplingParams(temperature=0, frequency_penalty=2.0)
    again = [*tokens, int(best)]
    step.assign(0)
    step.run("prefill", at([row(tokens, 0, 3, [0], 0, strong, {}, 3)]))
    step.run("decode", at([row(again, 3, 1, [0], 0, strong, {}, 3)]))
    assert int(step._counts.written[0, best]) == 1
    assert int(step._counts.written.sum()) == 1 and int(step._counts.in_prompt[0].sum()) == 3
    step.assign(0)
    assert int(step._counts.written.sum()) == 0


def test_logprobs_come_only_where_asked(step):
    step.assign(0)
    params = SamplingParams(temperature=0, logprobs=3)
    rows = at([row([1, 2], 0, 2, [0], 0, params), row([5], 0, 1, [1], 1)])
    with_logprobs, without = step.run("prefill", rows)
    raw = step.logits([1, 2], [4], 2)[-1].astype(np.float64)
    logp = raw - np.log(np.sum(np.exp(raw - raw.max()))) - raw.max()
    np.testing.assert_allclose(with_logprobs.logprob, logp.max(), rtol=1e-4)
    assert with_logprobs.top_ids == list(np.argsort(-raw)[:3])
    np.testing.assert_allclose(with_logprobs.top_logprobs, np.sort(logp)[::-1][:3], rtol=1e-4)
    assert list(without.top_ids) == []


class AlwaysTwo:
    """A policy that tells what it was asked and told."""

    def __init__(self):
        self.asked, self.told, self.skipped = [], [], 0

    def choose(self, contexts):
        self.asked.append(list(contexts))
        return 2

    def observe(self, seconds):
        self.told.append(seconds)

    def skip(self):
        self.skipped += 1


def test_the_policy_splits_decodes_only_and_learns_from_compiled_programs_only(step):
    tiny = tiny_engine.model(tiny_engine.config())
    policy = AlwaysTwo()
    split = tiny_engine.step(tiny, LAYOUT, num_slots=4, chunk_tokens=16, policy=policy)
    texts, pages = [[3, 1, 4, 1, 5], [2, 7, 1, 8]], [[9, 2], [5, 11]]
    drawn = {}
    for name, one in (("merged", step), ("split", split)):
        for slot in range(2):
            one.assign(slot)
        one.run("prefill", at([row(texts[i], 0, 3, pages[i], i) for i in range(2)]))
        drawn[name] = []
        for i in (0, 0, 0):  # the same step again, so that its program is there
            rows = at([row(texts[0], 3 + i, 1, pages[0], 0), row(texts[1], 3 + i, 1, pages[1], 1)])
            drawn[name].append([r.token_id for r in one.run("decode", rows)])
        alone = at([row(texts[0], 4, 1, pages[0], 0)])
        drawn[name].append([r.token_id for r in one.run("decode", alone)])
    assert drawn["split"] == drawn["merged"]
    assert policy.asked == [[3, 3]] * 3 + [[4]]
    assert policy.skipped == 2 and len(policy.told) == 2 and min(policy.told) > 0
    # Of the same step merged, and asked for: no other program's results.
    rows = at([row(texts[0], 3, 1, pages[0], 0), row(texts[1], 3, 1, pages[1], 1)])
    assert [r.token_id for r in split.run("decode", rows, num_microbatches=1)] == drawn["merged"][0]
    assert split.last_compiled and len(policy.asked) == 4
