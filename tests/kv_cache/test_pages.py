import random

import pytest

from jaxmoe.common.errors import CapacityError
from jaxmoe.kv_cache.pages import PageAllocator


def test_lowest_free_page_comes_first():
    pages = PageAllocator(4, 16)
    first = pages.allocate(3)
    assert first == [0, 1, 2]
    pages.free([first[1]])
    assert pages.allocate(2) == [1, 3]


def test_all_or_none():
    pages = PageAllocator(4, 16)
    pages.allocate(3)
    with pytest.raises(CapacityError, match="2 pages wanted, 1 of 4 free"):
        pages.allocate(2)
    assert pages.num_free == 1


def test_freeing_twice_is_caught():
    pages = PageAllocator(4, 16)
    held = pages.allocate(1)
    again = list(held)
    pages.free(held)
    assert held == []
    with pytest.raises(AssertionError, match="not held"):
        pages.free(again)


@pytest.mark.parametrize("tokens,want", [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for(tokens, want):
    assert PageAllocator(1, 16).pages_for(tokens) == want


def test_random_traffic_keeps_the_books():
    rng = random.Random(0)
    pages = PageAllocator(37, 8)
    held: list[list[int]] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            pages.free(held.pop(rng.randrange(len(held))))
        else:
            count = rng.randrange(6)
            if count <= pages.num_free:
                held.append(pages.allocate(count))
        pages.check()
        assert pages.num_free == 37 - sum(map(len, held))
        flat = [p for h in held for p in h]
        assert len(set(flat)) == len(flat)
