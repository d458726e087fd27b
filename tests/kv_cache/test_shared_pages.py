"""Pages that two processes share: bit for bit, checked, and of one size."""

import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.kv_cache import handoff, store
from jaxmoe.kv_cache.shared_pages import SharedPages
from jaxmoe.models.decoder import PageArraySpec

BF16 = np.dtype(ml_dtypes.bfloat16)
# Two arrays a layer, one of them with slots behind its positions; and one array.
LAYERS = [
    (PageArraySpec(2, 3, BF16), PageArraySpec(1, 5, np.dtype("float32"), entry_every=2)),
    (PageArraySpec(1, 7, BF16),),
]


@pytest.fixture
def pages():
    pages = SharedPages.create(LAYERS, 6, 4)
    yield pages
    pages.close()


def block(layer, seed, count):
    """What `handoff.take` returns of so many pages: padded."""
    caches = store.allocate(LAYERS, handoff.padded_pages(count), 4)
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in caches[layer])


def test_another_view_reads_what_was_written(pages):
    other = SharedPages(os.dup(pages.fd), LAYERS, 6, 4)
    written = {(0, 1, 3): block(0, 1, 3), (1, 0, 2): block(1, 2, 2), (0, 4, 2): block(0, 3, 2)}
    sums = {at: pages.write(*at, given) for at, given in written.items()}
    for at, given in written.items():
        got = other.read(*at, sums[at])
        for a, b in zip(got, given, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert a[: at[2]].tobytes() == np.asarray(b)[: at[2]].tobytes()
    other.close()


def test_what_was_written_over_is_noticed(pages):
    checksum = pages.write(0, 1, 2, block(0, 1, 2))
    pages.read(0, 1, 2, checksum)
    pages.write(0, 2, 1, block(0, 9, 1))
    with pytest.raises(ValueError, match="pages 1 to 2 of layer 0 are not those that were written"):
        pages.read(0, 1, 2, checksum)


def test_a_block_read_is_a_copy(pages):
    checksum = pages.write(1, 0, 1, block(1, 1, 1))
    (got,) = pages.read(1, 0, 1, checksum)
    before = got.tobytes()
    pages.write(1, 0, 1, block(1, 2, 1))
    assert got.tobytes() == before


def test_the_size_is_agreed_and_cannot_change(pages):
    with pytest.raises(ValueError, match=r"bytes, wanted \d+"):
        SharedPages(pages.fd, LAYERS, 7, 4)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(pages.fd, size)
