"""The scheduler driven by an engine computable by hand: the next token is a hash of all tokens
before it, read back from a dictionary keyed by (page, offset), so a wrong page, position or replay
gives a wrong text. Every entry also says which kind of step wrote it and for whom: a sequence
must meet nothing but what it would have written itself. With `states` a sequence has a recurrent
state too, in slots: all the tokens so far.
"""

import random

import pytest

from jaxmoe.kv_cache.pages import PageAllocator
from jaxmoe.kv_cache.prefix import PrefixCache
from jaxmoe.kv_cache.states import StateCache
from jaxmoe.request import Request, Sequence, Status
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.scheduler.prefill_route import StreamedPass
from jaxmoe.scheduler.scheduler import Scheduler


def next_token(tokens):
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 997
    return value


def alone(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeEngine:
    def __init__(
        self, *, pages=64, page_size=4, max_num_seqs=3, chunk=8, prefix=False, states=None, **more
    ):
        self.allocator = PageAllocator(pages, page_size)
        self.prefix = PrefixCache(self.allocator) if prefix else None
        self.scheduler = Scheduler(
            self.allocator,
            max_num_seqs=max_num_seqs,
            prefill_chunk_tokens=chunk,
            prefix=self.prefix,
            states=None if states is None else StateCache(max_num_seqs, states),
            **more,
        )
        self.num_slots = max_num_seqs
        self.states = {}  # slot -> origins of the tokens it has taken in
        self.origin = {}
        self.num_prefilled = 0
        self.memory = {}
        self.plans = []

    def add(self, name, prompt, max_tokens, salt=None, arrival_s=0.0):
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(),
            max_tokens=max_tokens,
            stop_ids=frozenset(),
            seed=0,
            arrival_s=arrival_s,
            cache_salt=salt,
        )
        seq = Sequence(request)
        self.scheduler.add(seq)
        return seq

    def step(self):
        plan = self.scheduler.plan()
        if plan is None:
            return None
        assert plan.rows
        self.plans.append((plan.kind, [(r.seq.request.request_id, r.count) for r in plan.rows]))
        size = self.allocator.page_size
        drawn = []
        for row in plan.rows:
            seq = row.seq
            end = row.start + row.count
            tokens = [seq.token(p) for p in range(end)]
            salt = seq.request.cache_salt
            self.num_prefilled += row.count if plan.kind == "prefill" else 0
            for position in range(row.start, end):
                slot = (seq.pages[position // size], position % size)
                assert self.allocator.holders(slot[0]) == 1, "a shared page is written"
                self.memory[slot] = seq.token(position)
                self.origin[slot] = plan.kind, salt, tuple(tokens[: position + 1])
            for position in range(end):
                slot = (seq.pages[position // size], position % size)
                kind = "prefill" if position < seq.num_prompt else "decode"
                assert self.origin[slot] == (kind, salt, tuple(tokens[: position + 1]))
            seen = [self.memory[(seq.pages[p // size], p % size)] for p in range(end)]
            drawn.append(next_token(seen))
            if self.prefix is None or self.scheduler.states is not None:
                self.move_state(plan.kind, row, tokens)
        self.scheduler.advance(plan)
        for row, token in zip(plan.rows, drawn, strict=True):
            if not row.samples:
                assert row.seq.num_computed < row.seq.num_tokens
                if row.seq.num_computed >= row.seq.num_prompt:
                    assert token == row.seq.token(row.seq.num_computed), "replay went another way"
                continue
            row.seq.output_token_ids.append(token)
            if len(row.seq.output_token_ids) == row.seq.request.max_tokens:
                self.scheduler.cancel(row.seq)
        self.allocator.check()
        held = [p for s in self.scheduler.running for p in s.pages]
        assert len(set(held)) == self.allocator.num_pages - self.allocator.num_free
        assert all(self.allocator.holders(p) == held.count(p) for p in held)
        if self.prefix is not None:
            self.prefix.check()
        if self.scheduler.states is not None:
            self.scheduler.states.check()
        return plan

    def move_state(self, kind, row, tokens):
        """As Ops.gated_delta would: from a slot to the sequence's own, and to where it is kept."""
        seq = row.seq
        source = seq.slot if seq.state_from < 0 else seq.state_from
        assert seq.is_new or seq.state_from < 0
        state = self.states[source] if row.start else ()
        before = [
            ("prefill" if p < seq.num_prompt else "decode", seq.token(p)) for p in range(row.start)
        ]
        assert list(state) == before, "the state of another text"
        saves = dict(row.saves)
        for position in range(row.start, row.start + row.count):
            state = (*state, (kind, tokens[position]))
            if (slot := saves.pop(position + 1, None)) is not None:
                assert slot >= self.num_slots and kind == "prefill"
                self.states[slot] = state
        assert not saves
        self.states[seq.slot] = state

    def drain(self, limit=10_000):
        for _ in range(limit):
            if self.step() is None:
                return
        raise AssertionError("the work never ends")


def test_one_sequence_is_chunked_then_decoded():
    engine = FakeEngine()
    seq = engine.add("a", range(19), 3)
    engine.drain()
    assert engine.plans == [
        ("prefill", [("a", 8)]),
        ("prefill", [("a", 8)]),
        ("prefill", [("a", 3)]),
        ("decode", [("a", 1)]),
        ("decode", [("a", 1)]),
    ]
    assert seq.output_token_ids == alone(range(19), 3)
    assert engine.allocator.num_free == 64


def test_short_prompts_are_packed_and_decoded_together():
    engine = FakeEngine()
    seqs = [engine.add(n, [i, i + 1, i + 2], 2) for i, n in enumerate("abc")]
    engine.drain()
    assert engine.plans == [
        ("prefill", [("a", 3), ("b", 3), ("c", 2)]),
        ("decode", [("a", 1), ("b", 1)]),
        ("prefill", [("c", 1)]),
        ("decode", [("c", 1)]),
    ]
    for i, seq in enumerate(seqs):
        assert seq.output_token_ids == alone([i, i + 1, i + 2], 2)


def test_decode_and_prefill_alternate_when_both_wait():
    engine = FakeEngine()
    engine.add("a", [1], 20)
    engine.step()
    engine.add("b", range(32), 1)
    engine.drain()
    kinds = [kind for kind, _ in engine.plans]
    assert kinds[:10] == ["prefill", "decode"] * 5  # the one of a, then the four chunks of b
    assert set(kinds[10:]) == {"decode"}


def test_no_more_than_max_num_seqs_run_and_the_queue_is_in_order():
    engine = FakeEngine(max_num_seqs=2)
    for name in "abcd":
        engine.add(name, [1, 2], 2)
    order = []
    while engine.scheduler.has_work:
        engine.step()
        assert len(engine.scheduler.running) <= 2
        for seq in engine.scheduler.running:
            if seq.request.request_id not in order:
                order.append(seq.request.request_id)
    assert order == list("abcd")


def test_admission_waits_for_pages_of_the_whole_prompt():
    engine = FakeEngine(pages=6, page_size=4)
    engine.add("a", range(15), 3)  # 4 pages, 5 in the end
    b = engine.add("b", range(9), 1)  # 3 pages
    engine.step()
    assert b.status is Status.WAITING and b.pages == []
    engine.drain()
    assert b.output_token_ids == alone(range(9), 1)


def test_the_latest_gives_way_when_pages_run_out_and_its_text_stays_the_same():
    engine = FakeEngine(pages=6, page_size=2)
    a = engine.add("a", [5, 6], 8)
    b = engine.add("b", [8, 9], 8)
    engine.drain()
    assert a.num_preemptions == 0 and b.num_preemptions > 0
    assert a.output_token_ids == alone([5, 6], 8)
    assert b.output_token_ids == alone([8, 9], 8)
    assert engine.allocator.num_free == 6


def test_a_sequence_that_fills_the_whole_pool_runs():
    engine = FakeEngine(pages=2, page_size=4)
    a = engine.add("a", range(7), 1)
    b = engine.add("b", range(4), 4)
    engine.drain()
    assert a.output_token_ids == alone(range(7), 1)
    assert b.output_token_ids == alone(range(4), 4)


@pytest.mark.parametrize("steps", range(6))
def test_cancel_frees_everything_at_any_step(steps):
    engine = FakeEngine(max_num_seqs=1)
    a = engine.add("a", range(19), 9)
    b = engine.add("b", [1, 2], 1)
    for _ in range(steps):
        engine.step()
    engine.scheduler.cancel(a)
    assert a.pages == [] and a.slot == -1 and engine.allocator.num_free == 64
    engine.drain()
    assert b.output_token_ids == alone([1, 2], 1)
    engine.scheduler.cancel(a)  # a second time does nothing
    assert engine.allocator.num_free == 64


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_gives_every_request_its_own_text(seed):
    rng = random.Random(seed)
    engine = FakeEngine(pages=12, page_size=3, max_num_seqs=4, chunk=rng.choice([1, 4, 9]))
    live, done = [], []
    for i in range(30):
        prompt = [rng.randrange(900) for _ in range(rng.randrange(1, 20))]
        seq = engine.add(str(i), prompt, rng.randrange(1, 36 - len(prompt)))
        live.append((seq, prompt))
        for _ in range(rng.randrange(6)):
            engine.step()
        if rng.random() < 0.15:
            victim = live.pop(rng.randrange(len(live)))
            engine.scheduler.cancel(victim[0])
    engine.drain()
    done = live
    for seq, prompt in done:
        assert seq.output_token_ids == alone(prompt, seq.request.max_tokens)
    assert engine.allocator.num_free == 12 and not engine.scheduler.has_work


def test_a_known_beginning_is_not_computed_again():
    engine = FakeEngine(prefix=True)
    for i, name in enumerate("ab"):
        seq = engine.add(name, [*range(16), i], 2)
        engine.drain()
        assert seq.num_cached == 16 * i
        assert seq.output_token_ids == alone([*range(16), i], 2)
    assert engine.num_prefilled == 17 + 1
    assert (engine.prefix.queried_tokens, engine.prefix.hit_tokens) == (34, 16)


def test_a_chat_computes_its_new_tokens_only():
    engine = FakeEngine(prefix=True, pages=400, chunk=64)
    first = engine.add("first", range(800), 30)
    engine.drain()
    assert engine.num_prefilled == 800
    turn = [*range(800), *first.output_token_ids, 1, 2, 3]
    second = engine.add("second", turn, 4)
    engine.drain()
    # The answer was written by decode and is new to prefill; the first turn is not.
    assert second.num_cached == 800 and engine.num_prefilled == 800 + 33
    assert second.output_token_ids == alone(turn, 4)


def test_salts_do_not_meet():
    engine = FakeEngine(prefix=True)
    cached = []
    for name, salt in (("a", None), ("b", "x"), ("c", "y"), ("d", "x"), ("e", None)):
        seq = engine.add(name, range(9), 1, salt)
        engine.drain()
        cached.append(seq.num_cached)
    assert cached == [0, 0, 0, 8, 8]


def test_completions_of_one_prompt_wait_for_the_first_to_compute_it():
    engine = FakeEngine(prefix=True)
    seqs = [engine.add(str(i), range(33), 3) for i in range(3)]
    engine.drain()
    assert [s.num_cached for s in seqs] == [0, 32, 32] and engine.num_prefilled == 33 + 2
    assert engine.plans[4] == ("prefill", [("0", 1), ("1", 1), ("2", 1)])


def test_a_cancelled_first_is_not_waited_for():
    engine = FakeEngine(prefix=True)
    a, b = (engine.add(n, range(33), 1) for n in "ab")
    engine.step()
    assert b.status is Status.WAITING
    engine.scheduler.cancel(a)
    engine.drain()
    assert b.num_cached == 8 and b.output_token_ids == alone(range(33), 1)


def test_preemption_finds_its_own_prompt_again():
    engine = FakeEngine(pages=8, page_size=2, prefix=True)
    a = engine.add("a", [5, 6, 7], 10)
    b = engine.add("b", [8, 9, 7], 10)
    engine.drain()
    assert b.num_preemptions > 0 and b.num_cached == 0
    assert a.output_token_ids == alone([5, 6, 7], 10)
    assert b.output_token_ids == alone([8, 9, 7], 10)
    assert engine.prefix.hit_tokens == 0


def test_a_chat_goes_on_from_the_state_of_its_last_turn():
    engine = FakeEngine(prefix=True, pages=400, chunk=64, states=2)
    first = engine.add("first", range(100), 30)
    engine.drain()
    turn = [*range(100), *first.output_token_ids, 1, 2, 3]
    second = engine.add("second", turn, 4)
    engine.drain()
    # A whole page ends at 96 within the first turn, whose last token is always computed.
    assert second.num_cached == 96 and engine.num_prefilled == 100 + 37
    assert second.output_token_ids == alone(turn, 4)


def test_where_prompts_part_the_second_keeps_a_state_for_the_third():
    engine = FakeEngine(prefix=True, states=3)
    cached = []
    for i, name in enumerate("abc"):
        seq = engine.add(name, [*range(17), *[i] * 14], 2)
        engine.drain()
        cached.append(seq.num_cached)
        assert seq.output_token_ids == alone([*range(17), *[i] * 14], 2)
    assert cached == [0, 0, 16]


def test_completions_of_one_prompt_start_from_one_state():
    engine = FakeEngine(prefix=True, states=1)
    seqs = [engine.add(str(i), range(33), 3) for i in range(3)]
    engine.drain()
    assert [s.num_cached for s in seqs] == [0, 32, 32] and engine.num_prefilled == 33 + 2


def test_pages_whose_state_is_gone_are_computed_again():
    engine = FakeEngine(prefix=True, states=1)
    for name, start in (("a", 0), ("b", 50)):
        engine.add(name, range(start, start + 17), 1)
        engine.drain()
    seq = engine.add("c", range(17), 1)
    engine.drain()
    assert seq.num_cached == 0 and seq.output_token_ids == alone(range(17), 1)


def test_a_plan_that_was_not_run_keeps_no_slot():
    engine = FakeEngine(prefix=True, states=1)
    engine.add("a", range(9), 1)
    for _ in range(3):
        saves = engine.scheduler.plan().rows[0].saves
        engine.scheduler._last_kind = "decode"
        if saves:
            assert [position for position, _ in saves] == [8]
    engine.drain()
    assert len(engine.scheduler.states) == 1


@pytest.mark.parametrize("states", [None, 0, 1, 4])
@pytest.mark.parametrize("seed", range(30))
def test_random_traffic_with_shared_beginnings(seed, states):
    rng = random.Random(seed)
    engine = FakeEngine(
        states=states,
        pages=rng.choice([12, 14, 30]),
        page_size=3,
        max_num_seqs=4,
        chunk=rng.choice([1, 4, 9]),
        prefix=True,
    )
    live = []
    for i in range(40):
        # Few values, so that prompts often begin alike.
        prompt = [rng.randrange(2)] * rng.randrange(1, 12)
        prompt += [rng.randrange(2) for _ in range(rng.randrange(8))]
        salt = rng.choice([None, None, "a"])
        seq = engine.add(str(i), prompt, rng.randrange(1, 36 - len(prompt)), salt)
        live.append((seq, prompt))
        for _ in range(rng.randrange(6)):
            engine.step()
        if rng.random() < 0.15:
            victim = live.pop(rng.randrange(len(live)))
            engine.scheduler.cancel(victim[0])
    engine.drain()
    for seq, prompt in live:
        assert seq.output_token_ids == alone(prompt, seq.request.max_tokens)
    assert engine.allocator.num_free == engine.allocator.num_pages
    if states != 0:
        assert engine.prefix.hit_tokens > 0


def test_the_only_one_that_decodes_gives_way_to_prompts_before_it():
    """A full pool, and its last page wanted by the latest arrival, while earlier ones prefill."""
    scheduler = Scheduler(
        PageAllocator(100, 16),
        max_num_seqs=3,
        prefill_chunk_tokens=512,
        prompt_logprobs_tokens=16,
    )
    for name, num_prompt, max_tokens, params in (
        ("a", 4, 8, SamplingParams()),
        ("long", 1500, 8, SamplingParams(prompt_logprobs=1)),
        ("c", 30, 120, SamplingParams()),
    ):
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(range(num_prompt)),
            params=params,
            max_tokens=max_tokens,
            stop_ids=frozenset(),
            seed=0,
            arrival_s=0.0,
        )
        scheduler.add(Sequence(request))
    preemptions = 0
    for _ in range(2000):
        plan = scheduler.plan()
        if plan is None:
            break
        assert plan.rows
        scheduler.advance(plan)
        for row in plan.rows:
            if row.samples:
                row.seq.output_token_ids.append(1)
                if len(row.seq.output_token_ids) == row.seq.request.max_tokens:
                    preemptions += row.seq.num_preemptions
                    scheduler.cancel(row.seq)
    assert not scheduler.has_work and preemptions
    scheduler.pages.check()


def test_a_short_prompt_overtakes_a_long_one_that_came_a_little_earlier():
    engine = FakeEngine(max_num_seqs=1, chunk=16, predict=lambda tokens: tokens * 1.0)
    engine.add("running", [1], 12)
    engine.step()
    for name, length, at in (("long", 20, 0.0), ("soon", 2, 17.0), ("late", 2, 18.5)):
        engine.add(name, range(length), 2, arrival_s=at)
    engine.drain()
    order = []
    for _, rows in engine.plans:
        order += [name for name, _ in rows if name not in order]
    assert order == ["running", "soon", "long", "late"]  # 19 < 20 < 20.5


def test_short_prompts_share_a_chunk_before_long_ones():
    engine = FakeEngine(max_num_seqs=3, chunk=8, predict=lambda tokens: tokens * 1.0)
    engine.add("long", range(30), 1)
    engine.step()
    engine.add("short", range(3), 1, arrival_s=4.0)
    engine.step()
    assert engine.plans[1] == ("prefill", [("short", 3), ("long", 5)])


@pytest.mark.parametrize("seed", range(20))
def test_no_prompt_is_overtaken_for_longer_than_it_takes_itself(seed):
    rng = random.Random(seed)
    engine = FakeEngine(pages=20, max_num_seqs=2, predict=lambda tokens: tokens * 2.0)
    seqs, started = [], []
    for i in range(60):
        prompt = range(rng.choice([1, 2, 3, 30]))
        seqs.append(engine.add(str(i), prompt, rng.randrange(1, 4), arrival_s=float(i)))
        engine.step()
        for _, rows in engine.plans[-1:]:
            started += [name for name, _ in rows if name not in started]
    engine.drain()
    for _, rows in engine.plans:
        started += [name for name, _ in rows if name not in started]
    at = {name: k for k, name in enumerate(started)}
    for early in range(60):
        for late in range(early + 1, 60):
            if at[str(late)] < at[str(early)]:
                assert late - early <= 2.0 * seqs[early].num_prompt


class Rows:
    """Limits as given."""

    def __init__(self, rows, tokens):
        self.rows, self.tokens = rows, tokens

    def max_rows(self, most):
        return min(most, self.rows)

    def chunk_tokens(self, num_decoding):
        assert num_decoding > 0
        return self.tokens


def test_a_target_limits_the_batch_and_chunks_beside_it():
    limits = Rows(2, 4)
    engine = FakeEngine(max_num_seqs=3, chunk=8, limits=limits)
    for i in range(3):
        engine.add(str(i), range(12), 6)
    engine.step()
    assert engine.plans[0] == ("prefill", [("0", 8)])  # nobody decodes yet
    engine.drain()
    assert max(len(rows) for kind, rows in engine.plans if kind == "decode") == 2
    decoding = False
    for kind, rows in engine.plans:
        if kind == "prefill" and decoding:
            assert sum(count for _, count in rows) <= 4
        decoding = decoding or kind == "decode"
    limits.rows, count = 3, len(engine.plans)
    for i in range(3):
        engine.add(f"again {i}", [1], 6)
    engine.drain()
    assert max(len(rows) for _, rows in engine.plans[count:]) == 3


def test_others_pass_who_waits_for_a_streamed_prompt():
    engine = FakeEngine(
        prefix=True,
        aside=True,
        streams=lambda tokens: StreamedPass("slp", tokens) if tokens > 20 else None,
    )
    beginning = list(range(24))
    engine.add("long", [*beginning, 1], 2)
    assert engine.scheduler.plan().kind == "stream"
    same = engine.add("same", [*beginning, 2], 2)
    engine.add("other", [5, 6], 2)
    for _ in range(3):
        engine.step()
    assert same.status is Status.WAITING
    assert [name for _, rows in engine.plans for name, _ in rows] == ["other"] * 2


class Keeper:
    """Keeps the fake engine's memory of a sequence's first pages; every third time it has no
    room.
    """

    def __init__(self):
        self.engine, self.kept, self.asked, self.restored = None, {}, 0, 0

    def cells(self, pages):
        size = self.engine.allocator.page_size
        return [(page, offset) for page in pages for offset in range(size)]

    def keep(self, seq, num_pages):
        self.asked += 1
        if self.asked % 3 == 0:
            return False
        cells = self.cells(seq.pages[:num_pages])
        self.kept[id(seq)] = [(self.engine.memory.get(c), self.engine.origin.get(c)) for c in cells]
        return True

    def restore(self, seq, num_pages):
        self.restored += 1
        content = self.kept.pop(id(seq))
        for cell, (token, origin) in zip(self.cells(seq.pages[:num_pages]), content, strict=True):
            self.engine.memory[cell], self.engine.origin[cell] = token, origin

    def forget(self, seq):
        del self.kept[id(seq)]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_kept_pages_are_gone_on_from(seed, prefix):
    rng, keeper = random.Random(seed), Keeper()
    engine = FakeEngine(
        pages=rng.choice([9, 12]), max_num_seqs=4, prefix=prefix, keeper=keeper, states=None
    )
    engine.move_state = lambda *args: None  # no model with such state keeps pages
    keeper.engine, live = engine, []
    for i in range(30):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
        seq = engine.add(str(i), prompt, rng.randrange(1, 34 - len(prompt)))
        live.append((seq, prompt))
        for _ in range(rng.randrange(8)):
            engine.step()
        if rng.random() < 0.2:
            engine.scheduler.cancel(live.pop(rng.randrange(len(live)))[0])
    engine.drain()
    for seq, prompt in live:
        assert seq.output_token_ids == alone(prompt, seq.request.max_tokens)
    assert engine.allocator.num_free == engine.allocator.num_pages
    assert keeper.kept == {} and engine.scheduler._kept == {}
    assert keeper.restored > 0 and keeper.asked > keeper.restored


def test_a_kept_sequence_feeds_nothing_again():
    keeper = Keeper()
    engine = FakeEngine(pages=6, max_num_seqs=2, keeper=keeper)
    engine.move_state = lambda *args: None
    keeper.engine = engine
    first, second = engine.add("a", [1, 2, 3], 16), engine.add("b", [4, 5, 6], 16)
    engine.drain()
    assert first.num_preemptions == 0 and second.num_preemptions > 0 and keeper.restored > 0
    fed = sum(count for _, rows in engine.plans for name, count in rows if name == "b")
    assert fed == 3 + 15  # each token once
