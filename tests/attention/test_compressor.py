"""Entries against softmax means taken at once, however a text is cut into steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.attention.compressor import _pool, state_shape
from jaxmoe.ffi.ops import StepInputs

H, LENGTH, NUM_SLOTS = 6, 19, 5


def step_of(parts: list[tuple[int, int, int, int]], saves: dict[int, int]) -> StepInputs:
    """parts: (row, first position, count, slot read); row r writes slot r; padding at the end."""
    rows, positions, states = [], [], np.full(2, -1, np.int32)
    for row, begin, count, source in parts:
        rows += [row] * count
        positions += range(begin, begin + count)
        states[row] = source
    num_tokens = len(rows) + 2
    padded = np.zeros((2, num_tokens), np.int32)
    padded[0] = -1
    padded[:, : len(rows)] = rows, positions
    state_saves = np.full(num_tokens, -1, np.int32)
    for token, slot in saves.items():
        state_saves[token] = slot
    slots = np.arange(2, dtype=np.int32)
    tables = np.zeros((2, 1), np.int32)
    return StepInputs(
        padded[0], padded[1], padded[0], padded[0], tables, states, slots, state_saves
    )


def want(kv: np.ndarray, scores: np.ndarray, ratio: int) -> np.ndarray:
    """Of every whole entry `[n, H]`: the second half is of its own positions, the first of those
    of the entry before.
    """
    entries = []
    for begin in range(0, LENGTH - ratio + 1, ratio):
        own = slice(begin, begin + ratio)
        values, logits = kv[own, -1], scores[own, -1]
        if kv.shape[1] == 2 and begin:
            before = slice(begin - ratio, begin)
            values = np.concatenate([kv[before, 0], values])
            logits = np.concatenate([scores[before, 0], logits])
        weights = np.exp(logits - logits.max(axis=0))
        entries.append((weights * values).sum(axis=0) / weights.sum(axis=0))
    return np.stack(entries)


@pytest.mark.parametrize("overlaps", [False, True])
def test_entries_and_states(overlaps: bool):
    ratio, widths = 4, 2 if overlaps else 1
    rng = np.random.default_rng(0)
    kv, scores = rng.standard_normal((2, 2, LENGTH, widths, H)).astype(np.float32) * 3
    pool = jax.jit(_pool, static_argnames="ratio")
    state = jnp.full((NUM_SLOTS, *state_shape(overlaps, H)), jnp.nan)

    def run(state, parts, saves=None):
        step = step_of(parts, saves or {})
        padding = np.zeros((2, widths, H), np.float32)
        given = [
            np.concatenate([a[row, begin : begin + count] for row, begin, count, _ in parts])
            for a in (kv, scores)
        ]
        given = [jnp.asarray(np.concatenate([a, padding])) for a in given]
        means, state = pool(*given, state, step, ratio=ratio)
        assert not means[-2:].any()
        return np.asarray(means)[:-2], state

    means: list[list[np.ndarray]] = [[], []]
    for parts, saves in [
        ([(0, 0, 7, 0)], {5: 3}),
        ([(0, 7, 3, 0), (1, 0, 9, 1)], None),
        ([(1, 9, 10, 1), (0, 10, 9, 0)], None),
    ]:
        got, state = run(state, parts, saves)
        for row, _, count, _ in parts:
            means[row].append(got[:count])
            got = got[count:]
    for row in range(2):
        ends = np.concatenate(means[row])[ratio - 1 :: ratio]
        np.testing.assert_allclose(ends, want(kv[row], scores[row], ratio), rtol=2e-5, atol=2e-5)
    # From the state after six tokens, which was kept, the rest has the same bits.
    again, _ = run(state, [(0, 6, 13, 3)])
    np.testing.assert_array_equal(again, np.concatenate(means[0])[6:])
