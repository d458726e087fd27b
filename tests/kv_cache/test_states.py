"""Who has which slot for a kept state."""

import random

import pytest

from jaxmoe.kv_cache.layout import plan_states
from jaxmoe.kv_cache.states import StateCache


def keep(states, *keys):
    for key in keys:
        states.publish(key, states.reserve())
        states.check()


def test_the_longest_kept_beginning_is_found():
    states = StateCache(3, 4)
    keep(states, b"b", b"d")
    assert states.find([b"a", b"b", b"c", b"d", b"e"]) == (4, states.find([b"d"])[1])
    assert states.find([b"a", b"b", b"c"])[0] == 2
    assert states.find([b"a"]) == states.find([]) == (0, -1)
    assert b"b" in states and b"a" not in states and len(states) == 2


def test_the_least_recently_used_goes_first_but_never_a_held_one():
    states = StateCache(3, 3)
    keep(states, b"a", b"b", b"c")
    _, held = states.find([b"a"])
    states.hold(held), states.hold(held), states.release(held)
    states.find([b"b"])
    keep(states, b"d")  # in place of c
    assert [key in states for key in (b"a", b"b", b"c", b"d")] == [True, True, False, True]
    keep(states, b"e", b"f")
    assert states.find([b"a"]) == (1, held)
    states.reserve(), states.reserve()
    assert states.reserve() == -1 and len(states) == 1
    states.check()
    states.forget_reserved()
    states.release(held)
    keep(states, b"g", b"h", b"i")
    assert b"a" not in states


def test_of_equal_states_the_first_stays():
    states = StateCache(0, 2)
    one, two = states.reserve(), states.reserve()
    states.publish(b"a", one), states.publish(b"a", two)
    assert states.find([b"a"]) == (1, one)
    states.check()


def test_a_cache_without_slots_keeps_nothing():
    states = StateCache(5, 0)
    assert states.reserve() == -1 and states.find([b"a"]) == (0, -1)


def test_any_order_of_calls():
    rng = random.Random(0)
    states, held = StateCache(10, 5), []
    for _ in range(2000):
        keys = [bytes([rng.randrange(12)]) for _ in range(3)]
        count, slot = states.find(keys)
        if count and rng.random() < 0.4:
            states.hold(slot), held.append(slot)
        if held and rng.random() < 0.4:
            states.release(held.pop(rng.randrange(len(held))))
        slots = [states.reserve() for _ in range(rng.randrange(3))]
        assert not set(slots) & set(held)
        states.check()
        for slot in slots:
            if slot >= 0 and rng.random() < 0.8:
                states.publish(rng.choice(keys), slot)
        states.forget_reserved()
        states.check()


@pytest.mark.parametrize(
    ("prefix_cache", "gb", "kept"), [(True, None, 10), (True, 0.25, 2), (True, 0, 0), (False, 1, 0)]
)
def test_how_many_states_are_kept(prefix_cache, gb, kept):
    layout = plan_states(
        slot_bytes=100 << 20, max_num_seqs=8, prefix_cache=prefix_cache, state_cache_gb=gb
    )
    assert (layout.num_running, layout.num_kept, layout.num_slots) == (8, kept, 8 + kept)
    assert layout.total_bytes == (8 + kept) * (100 << 20)


def test_models_without_recurrent_state_have_no_slots():
    assert plan_states(slot_bytes=0, max_num_seqs=8, prefix_cache=True, state_cache_gb=None) is None
