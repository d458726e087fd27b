"""Blocks of pages between page arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kv_cache import handoff

CPU = jax.local_devices(backend="cpu")[0]


def cache(seed, num_pages):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((num_pages, 4, heads, 8)) for heads in (1, 2)]
    return tuple(jax.device_put(jnp.asarray(a, jnp.bfloat16), CPU) for a in arrays)


@pytest.mark.parametrize(
    "source, target",
    [([3], [0]), ([5, 0, 2], [9, 1, 10]), ([1, 2, 3, 4], [4, 3, 2, 1]), (range(6), range(5, 11))],
)
def test_pages_arrive_where_they_are_to_and_nowhere_else(source, target):
    one, other = cache(1, 6), cache(2, 11)
    want = [np.array(a) for a in other]
    for before, array in zip(want, one, strict=True):
        before[list(target)] = np.asarray(array)[list(source)]
    block = handoff.send(handoff.take(one, source), CPU)
    got = handoff.put(other, target, block)
    assert all(a.is_deleted() for a in other) and not any(a.is_deleted() for a in one)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g), w)


def test_few_programs_serve_all_lengths():
    sizes = {handoff.take(cache(1, 64), range(n))[0].shape[0] for n in range(1, 65)}
    assert sizes == {1, 2, 4, 8, 16, 32, 64}


def test_a_block_is_what_the_pages_held_when_it_was_taken():
    one = cache(1, 6)
    block = handoff.take(one, [2])
    want = np.asarray(one[0])[2]
    one = handoff.put(one, [2], handoff.take(cache(2, 6), [3]))
    np.testing.assert_array_equal(np.asarray(block[0])[0], want)
