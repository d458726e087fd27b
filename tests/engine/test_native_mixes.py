"""The embedded demo model under random mixes: requests come and go at any step, share beginnings,
are preempted and aborted, and every greedy or seeded answer has the tokens it has alone.
"""

import random
from pathlib import Path

import pytest

from jaxmoe import LLM, SamplingParams

PROGRAMS = Path(__file__).parents[2] / "build" / "test_programs"
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep."
)


OPTIONS = dict(
    max_num_seqs=4,
    max_model_len=128,
    prefill_chunk_tokens=16,
    page_size=4,
    cache_dir=str(PROGRAMS),
    show_progress=False,
)


@pytest.fixture(scope="module")
def llm():
    with LLM(**OPTIONS) as llm:
        yield llm


def requests(llm, rng, count, penalties):
    """Token ids and parameters; prompts are beginnings of few texts."""
    texts = [TEXT[start:] for start in (0, 27, 55)]
    for i in range(count):
        ids = llm.prompt_ids(rng.choice(texts))[: rng.randrange(1, 40)]
        params = SamplingParams(
            temperature=rng.choice([0, 0.9]),
            seed=i,
            max_tokens=rng.randrange(1, 20),
            ignore_eos=True,
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]) if penalties else 1.0,
            prompt_logprobs=rng.choice([None, None, None, 0]),
        )
        yield ids, params


def answer(llm, ids, params):
    output = llm.generate([ids], params)[0]
    return output.outputs[0].token_ids, output.prompt_logprobs


class AnyBatches:
    """Decodes merged or in two microbatches, as it comes."""

    def __init__(self, rng):
        self.rng, self.overlapped = rng, 0

    def choose(self, contexts):
        n = self.rng.choice([1, 2])
        self.overlapped += n > 1 and len(contexts) > 1
        return n

    def observe(self, seconds):
        pass

    def skip(self):
        pass


def check_mixes(llm, seeds, count, *, penalties=False):
    """Hit tokens, preemptions, and sequences whose pages were put back, that the mixes met."""
    engine, met = llm.engine, [0, 0]
    keeper = engine.scheduler._keeper
    for seed in seeds:
        rng = random.Random(seed)
        asked = list(requests(llm, rng, count, penalties))
        prefix, engine.scheduler.prefix = engine.prefix, None
        alone = [answer(llm, *request) for request in asked]
        engine.scheduler.prefix = prefix if rng.random() < 0.8 else None
        # Pages of those that give way are kept in two of three mixes.
        engine.scheduler._keeper = keeper if seed % 3 else None
        hits = prefix.hit_tokens
        held = engine.pages.allocate(rng.choice([0, engine.pages.num_free - 18]))
        waiting = rng.sample(range(count), count)
        doomed = set(rng.sample(waiting, count // 5))
        outputs, seqs = {}, []
        while waiting or engine.has_work:
            if waiting and rng.random() < 0.4:
                i = waiting.pop()
                engine.add_request(*asked[i], request_id=f"{seed}-{i}")
                seqs.append(engine.scheduler.waiting[-1])
            if doomed and rng.random() < 0.2:
                engine.abort(f"{seed}-{doomed.pop()}")
            for delta in engine.step():
                if delta.output is not None:
                    outputs[int(delta.request_id.split("-")[1])] = delta.output
        engine.pages.free(held)
        assert engine.pages.num_free == engine.pages.num_pages
        for i, output in outputs.items():
            assert (output.outputs[0].token_ids, output.prompt_logprobs) == alone[i], (seed, i)
        assert len(outputs) >= count - count // 5
        met[0] += prefix.hit_tokens - hits
        met[1] += sum(s.num_preemptions for s in seqs)
        engine.scheduler.prefix, engine.scheduler._keeper = prefix, keeper
        assert keeper.used_bytes == 0
    return [*met, keeper.num_restored]


def test_some_mixes(llm):
    hits, preemptions, _ = check_mixes(llm, range(3), 10)
    assert hits > 0 and preemptions > 0


@pytest.mark.parametrize("kept", [True, False])
def test_who_gives_way_goes_on_with_the_same_tokens(llm, kept):
    engine = llm.engine
    keeper = engine.scheduler._keeper
    asked = [
        (llm.prompt_ids(text)[:8], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
        for text in (TEXT, TEXT[27:])
    ]
    alone = [answer(llm, *request)[0] for request in asked]
    # Room for one of them and a half.
    held = engine.pages.allocate(engine.pages.num_free - 12)
    engine.scheduler._keeper = keeper if kept else None
    before, fed = keeper.num_restored, engine.stats()['step_tokens_total{kind="decode"}']
    outputs = [output.outputs[0].token_ids for output in llm.generate(*zip(*asked, strict=True))]
    fed = engine.stats()['step_tokens_total{kind="decode"}'] - fed
    engine.scheduler._keeper = keeper
    engine.pages.free(held)
    assert outputs == alone and keeper.used_bytes == 0
    assert (keeper.num_restored - before > 0) == kept
    assert (fed == 2 * 23) == kept, "each token is fed once where pages are kept"


@pytest.mark.slow
def test_two_hundred_mixes_and_restarts():
    """Each engine's mixes hold to answers that the one before gave, too; every second one decodes
    in overlapped microbatches now and then.
    """
    hits = preemptions = restored = 0
    policy = AnyBatches(random.Random(3))
    known = None
    for begin in range(0, 200, 40):
        with LLM(**OPTIONS) as llm:
            if begin % 80:
                llm._started.step.policy = policy
            asked = list(requests(llm, random.Random(7), 20, True))
            answers = [answer(llm, *request) for request in asked]
            known = known or answers
            assert answers == known
            met = check_mixes(llm, range(begin, begin + 40), 14, penalties=True)
            hits, preemptions = hits + met[0], preemptions + met[1]
            restored += met[2]
    assert hits > 1000 and preemptions > 50 and restored > 20
    assert policy.overlapped > 500
