"""Whether it fits, from numbers alone."""

from __future__ import annotations

import pytest

from jaxmoe.engine.memory_plan import Change, Item, MemoryPlan
from jaxmoe.weights.memory import Room

GIB = 1 << 30
ITEMS = (
    Item("weights", 6 * GIB),
    Item("conversion", 2 * GIB, when="loading"),
    Item("cache", GIB, when="running"),
    Item("programs", GIB // 2, "estimated", when="running"),
)


def plan(*rooms, changes=()):
    given = tuple(Room(int(gib * GIB), f"source {i}") for i, gib in enumerate(rooms))
    return MemoryPlan("a model", ITEMS, given, changes)


def test_the_peak_is_of_loading_or_of_running():
    assert plan(9).peak_bytes == 8 * GIB
    running = MemoryPlan("m", (*ITEMS, Item("more", GIB, when="running")), (Room(9 * GIB, "x"),))
    assert running.peak_bytes == 8.5 * GIB


@pytest.mark.parametrize(
    ("rooms", "fits", "short"),
    [((8,), True, 0), ((9, 10), True, -1), ((7.5,), False, 0.5), ((64, 2), False, 6)],
)
def test_the_tightest_room_decides(rooms, fits, short):
    given = plan(*rooms)
    assert given.fits is fits and given.short_bytes == short * GIB


def test_what_fits_is_said():
    text = plan(10).describe()
    assert "FITS: 2.00 GiB to spare." in text and "8.00 GiB  at the peak" in text
    assert "2.00 GiB  conversion (while loading)" in text
    assert "programs (while running), estimated" in text


def test_what_does_not_fit_is_said_with_what_helps():
    changes = (
        Change("--a", 7 * GIB, "slow"),
        Change("--b", int(7.9 * GIB), "short"),
        Change("--c", 9 * GIB, "more"),
    )
    text = plan(7.5, changes=changes).describe()
    assert "DOES NOT FIT: needs 8.00 GiB, 7.50 GiB available (source 0); short by 0.50 GiB" in text
    assert "use --a: then 7.00 GiB; slow" in text and "--b" not in text and "--c" not in text
    text = plan(6, changes=changes).describe()
    assert "not enough alone: --a" in text and "not enough alone: --b" in text
    assert "--c" not in text and "free 2.00 GiB more, or use a smaller checkpoint" in text
    assert "raise the limit by 1.00 GiB: source 1" in plan(64, 7).describe()
