"""Pages found by content: keys, holders, eviction order, and random traffic against page values."""

import random

import pytest

from jaxmoe.common.errors import CapacityError
from jaxmoe.kv_cache.pages import PageAllocator
from jaxmoe.kv_cache.prefix import PrefixCache

KEY = bytes(16)


def make(num_pages=8, page_size=4):
    pages = PageAllocator(num_pages, page_size)
    return pages, PrefixCache(pages, KEY)


def fill(pages, cache, prompt, salt=None):
    """Computes a prompt as a scheduler would: its pages, held."""
    keys = cache.page_keys(prompt, salt)
    found = cache.hold(keys, len(prompt))
    new = pages.allocate(pages.pages_for(len(prompt)) - len(found))
    held = found + new
    cache.publish(keys[len(found) :], held[len(found) : len(keys)])
    return held, len(found)


def test_keys_are_of_whole_pages_and_of_all_that_came_before():
    _, cache = make()
    a = cache.page_keys(range(11), None)
    assert len(a) == 2 and all(len(key) == 16 for key in a)
    assert cache.page_keys(range(8), None) == a
    assert cache.page_keys([9, *range(1, 8)], None)[1] != a[1]
    assert cache.page_keys([*range(4), 9, 5, 6, 7], None)[0] == a[0]
    salted = [cache.page_keys(range(8), salt)[0] for salt in (None, "", "a", "b")]
    assert len(set(salted)) == 4


def test_hash_keys_differ_between_processes():
    pages = PageAllocator(8, 4)
    keys = {PrefixCache(pages).page_keys(range(4), None)[0] for _ in range(4)}
    assert len(keys) == 4


@pytest.mark.parametrize("length,want", [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (30, 2)])
def test_the_last_token_is_always_left_to_compute(length, want):
    pages, cache = make()
    held, _ = fill(pages, cache, range(9))
    prompt = range(length)
    found = cache.hold(cache.page_keys(prompt, None), len(prompt))
    assert found == held[:want]
    assert [pages.holders(p) for p in held[:2]] == [2] * want + [1] * (2 - want)


def test_pages_stay_until_they_are_needed_for_something_else():
    pages, cache = make(num_pages=4)
    held, _ = fill(pages, cache, range(9))  # pages 0 and 1 kept, 2 not
    pages.free(held)
    assert (pages.num_free, pages.num_idle, len(cache)) == (4, 2, 2)
    assert pages.allocate(2) == [2, 3]  # unused ones first
    assert pages.allocate(1) == [1]  # then the end of the prefix, before its beginning
    assert len(cache) == 1 and cache.num_evictions == 1
    again, hits = fill(pages, cache, range(4))
    assert hits == 0 and again == [0] and len(cache) == 0 + 1


def test_least_recently_used_goes_first():
    pages, cache = make(num_pages=3)
    prompts = [[i, *range(4)] for i in range(3)]
    for prompt in prompts[:2]:
        held, _ = fill(pages, cache, prompt[:4])
        pages.free(held)
    held = cache.hold(cache.page_keys(prompts[0], None), 5)  # used again
    assert held == [0]
    pages.free(held)
    pages.allocate(2)  # the unused one and the one of prompts[1]
    assert cache.hold(cache.page_keys(prompts[1], None), 5) == []
    assert cache.hold(cache.page_keys(prompts[0], None), 5) == [0]


def test_held_pages_are_never_given_away():
    pages, cache = make(num_pages=2)
    held, _ = fill(pages, cache, range(8))
    shared = cache.hold(cache.page_keys(range(9), None), 9)
    pages.free(held)
    assert pages.num_free == 0
    with pytest.raises(CapacityError):
        pages.allocate(1)
    pages.free(shared)
    assert pages.num_free == 2


def test_equal_pages_filled_at_once_are_known_once():
    pages, cache = make()
    keys = cache.page_keys(range(4), None)
    a, b = pages.allocate(1), pages.allocate(1)
    cache.publish(keys, a)
    cache.publish(keys, b)
    assert len(cache) == 1 and cache.hold(keys, 5) == [0]
    pages.free(b)
    assert pages.num_idle == 0
    cache.check()


@pytest.mark.parametrize("seed", range(10))
def test_random_traffic_finds_only_what_was_written(seed):
    rng = random.Random(seed)
    pages, cache = make(num_pages=24, page_size=3)
    memory, live, hits = {}, [], 0
    for _ in range(600):
        if live and (rng.random() < 0.4 or len(live) > 5):
            pages.free(live.pop(rng.randrange(len(live))))
        else:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
            salt = rng.choice([None, "a"])
            keys = cache.page_keys(prompt, salt)
            found = cache.hold(keys, len(prompt))
            need = pages.pages_for(len(prompt)) - len(found)
            if need > pages.num_free:
                pages.free(found)
                continue
            held = found + pages.allocate(need)
            for i, page in enumerate(held):
                content = salt, tuple(prompt[: 3 * i + 3])
                if i < len(found):
                    assert memory[page] == content
                else:
                    assert pages.holders(page) == 1
                    memory[page] = content
            cache.publish(keys[len(found) :], held[len(found) : len(keys)])
            hits += len(found)
            live.append(held)
        pages.check()
        cache.check()
        held = {p for h in live for p in h}
        assert pages.num_free == 24 - len(held)
        assert all(pages.holders(p) == sum(h.count(p) for h in live) for p in held)
    assert hits > 50 and cache.num_evictions > 50
