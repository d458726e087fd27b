"""Joined deltas say what the single ones said."""

import itertools
import random

from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.engine.deltas import MERGED_TOKENS, coalesce, merge
from jaxmoe.engine.messages import Failed
from jaxmoe.request import Delta, TokenLogprob


def deltas(request_id, index, count, *, logprobs=False, ends=True):
    for i in range(count):
        entry = (TokenLogprob(i, -1.0, ()),) if logprobs else None
        reason = "stop" if ends and i == count - 1 else None
        prompt = (None,) if logprobs and not i else None
        yield Delta(request_id, index, f"{i},", (i,), entry, reason, prompt_logprobs=prompt)


def told(events, request_id, index):
    own = [
        e for e in events if isinstance(e, Delta) and (e.request_id, e.index) == (request_id, index)
    ]
    return (
        "".join(d.text for d in own),
        tuple(itertools.chain(*(d.token_ids for d in own))),
        [d.finish_reason for d in own if d.finish_reason],
        tuple(itertools.chain(*(d.logprobs or () for d in own))),
        [d.prompt_logprobs for d in own if d.prompt_logprobs],
    )


def test_mixed_streams_say_the_same():
    rng = random.Random(0)
    for _ in range(50):
        sources = {
            (name, index): list(
                deltas(
                    name, index, rng.randrange(1, 90), logprobs=name == "b", ends=rng.random() < 0.5
                )
            )
            for name in "abc"
            for index in range(rng.randrange(1, 4))
        }
        order = [key for key, items in sources.items() for _ in items]
        rng.shuffle(order)
        at = {key: iter(items) for key, items in sources.items()}
        events = [next(at[key]) for key in order]
        joined = coalesce(events)
        assert len(joined) < len(events)
        for key, items in sources.items():
            assert told(joined, *key) == told(items, *key)
        assert all(len(d.token_ids) <= MERGED_TOKENS for d in joined)
        # One by one it is the same.
        for (name, index), items in sources.items():
            one = items[0]
            for new in items[1:]:
                one = merge(one, new) or new
            if len(items) <= MERGED_TOKENS:
                (same,) = [d for d in joined if (d.request_id, d.index) == (name, index)]
                assert same == one


def test_the_last_delta_stays_the_last_and_refusals_stay_where_they_are():
    events = [
        PrefillProgress("a", 1, 9),
        *deltas("a", 0, 3, ends=True),
        PrefillProgress("b", 1, 9),
        Failed("c", "request", "no"),
        *deltas("a", 1, 3, ends=True),
        PrefillProgress("b", 5, 9),
    ]
    joined = coalesce(events)
    assert [type(e).__name__ for e in joined] == [
        *("PrefillProgress", "Delta", "Failed", "Delta", "PrefillProgress")
    ]
    assert joined[1].index == 0 and joined[3].index == 1 and joined[4].computed_tokens == 5
    assert coalesce([]) == [] and coalesce(events[:1]) == events[:1]
