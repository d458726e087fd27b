"""The batch and the chunks that a target time per token allows."""

from __future__ import annotations

import pytest

from jaxmoe.scheduler.tpot_target import _RETRY_STEPS, TpotTarget

SIZES = (16, 64, 256, 512)


def settled(target_s, step_s, most=16, steps=200):
    """Rows after so many decodes of always as many as are allowed."""
    target, rows = TpotTarget(target_s, SIZES), []
    for _ in range(steps):
        rows.append(target.max_rows(most))
        target.observe("decode", rows[-1], step_s(rows[-1]))
    return rows


@pytest.mark.parametrize(
    "target_s, want",
    [(0.050, 5), (0.0105, 1), (0.001, 1), (1.0, 16)],  # a step takes 10 ms, and 10 ms a row
)
def test_the_batch_grows_to_what_the_target_allows(target_s, want):
    rows = settled(target_s, lambda n: 0.010 * n)
    assert rows[-1] == want and rows[0] == 1
    # One step beyond it at most, which measures that it is too slow.
    assert sum(n > want for n in rows) <= 1
    assert all(b - a <= 1 for a, b in zip(rows, rows[1:], strict=False))


def test_what_was_too_slow_is_tried_again():
    slow = {"by": 1.0}
    target = TpotTarget(0.050, SIZES)
    for _ in range(50):
        n = target.max_rows(8)
        target.observe("decode", n, 0.010 * n * slow["by"])
    assert target.max_rows(8) == 5
    slow["by"] = 0.5
    seen = set()
    for _ in range(5 * _RETRY_STEPS):
        n = target.max_rows(8)
        seen.add(n)
        target.observe("decode", n, 0.010 * n * slow["by"])
    assert max(seen) == 8


def test_a_batch_that_got_slower_shrinks():
    target = TpotTarget(0.050, SIZES)
    for n in range(1, 9):
        target.observe("decode", n, 0.005 * n)
    assert target.max_rows(8) == 8
    for _ in range(30):
        target.observe("decode", 8, 0.2)
    assert target.max_rows(8) == 7


@pytest.mark.parametrize(
    "measured, want",
    [
        ({}, 16),
        ({16: 0.002}, 256),  # 64 is expected in 8 ms, 256 in 32, 512 in 64
        ({16: 0.002, 64: 0.004}, 512),
        ({16: 0.002, 64: 0.004, 256: 0.041}, 64),
        ({16: 0.5}, 16),
    ],
)
def test_chunks_fit_between_two_tokens(measured, want):
    target = TpotTarget(0.050, SIZES)
    target.observe("decode", 2, 0.010)  # which leaves 40 ms
    for size, seconds in measured.items():
        target.observe("prefill", size - 3, seconds)
    assert target.chunk_tokens(3) == want
    target.observe("stream", 1000, 9.0)
    assert target.chunk_tokens(3) == want and "50 ms" in target.describe()
