"""The attention kernels against the reference, interpreted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ffi.reference import paged_attention
from jaxmoe.kernels import attention
from jaxmoe.kernels.grouped_matmul import tiles_of

Z = 16  # page size


def _case(rng, lengths, counts, kv_heads, dims, dtype, num_pages=40):
    """Packed tokens: row i feeds the last counts[i] of lengths[i] positions."""
    pages = rng.permutation(num_pages)
    cache = tuple(
        jnp.asarray(rng.standard_normal((num_pages, Z, kv_heads, d)), dtype) for d in dims
    )
    width = max(-(-n // Z) for n in lengths) + 1
    tables, used = np.full((len(lengths), width), -1, np.int32), 0
    rows, positions = [], []
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        need = -(-length // Z)
        tables[i, :need] = pages[used : used + need]
        used += need
        rows += [i] * count
        positions += range(length - count, length)
    return (
        cache,
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(tables),
    )


@pytest.mark.parametrize("window, with_sinks", [(None, False), (20, True)])
@pytest.mark.parametrize(
    "heads, kv_heads, dims, v_dim",
    [(8, 2, (64, 64), 64), (4, 1, (96,), 64), (3, 3, (48, 32), 32)],
)
def test_both_kernels_are_the_reference(heads, kv_heads, dims, v_dim, window, with_sinks):
    rng = np.random.default_rng(1)
    cache, rows, positions, tables = _case(
        rng, (150, 70, 1), (140, 3, 1), kv_heads, dims, jnp.float32
    )
    num_tokens = rows.shape[0]
    q = jnp.asarray(rng.standard_normal((num_tokens, heads, dims[0])), jnp.float32)
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32) if with_sinks else None
    want = paged_attention(
        q, cache, rows, positions, tables, scale=0.2, v_dim=v_dim, window=window, sinks=sinks
    )
    flat = [a.reshape(-1, *a.shape[2:]) for a in cache]
    keys = attention.sources(flat[0], heads)
    values = attention.sources(flat[-1], heads, v_dim)
    starts, ends = jnp.asarray([0, 140, 143]), jnp.asarray([140, 143, 144])
    tiles = tiles_of(starts, ends, num_tokens, attention.QUERY_ROWS)
    out, lse = attention.flash_attention(
        q,
        keys,
        values,
        tiles,
        positions,
        tables,
        page_size=Z,
        scale=0.2,
        window=window,
        interpret=True,
    )
    got = attention.merge(out[None], lse[None], sinks)
    np.testing.assert_allclose(got, want, atol=2e-5)
    some = jnp.asarray([0, 1, 139, 140, 142, 143])
    padded_rows = jnp.where(jnp.arange(6) == 1, -1, rows[some])
    out, lse = attention.paged_decode(
        q[some],
        keys,
        values,
        padded_rows,
        positions[some],
        tables,
        page_size=Z,
        num_splits=3,
        scale=0.2,
        window=window,
        interpret=True,
    )
    got = np.array(attention.merge(out, lse, sinks))
    assert not got[1].any()
    got[1] = want[1]
    np.testing.assert_allclose(got, np.asarray(want)[np.asarray(some)], atol=2e-5)


def test_spans_of_a_contiguous_context_merge():
    rng = np.random.default_rng(2)
    heads, length, count = 2, 200, 130
    cache, rows, positions, tables = _case(rng, (length,), (count,), heads, (64, 32), jnp.float32)
    q = jnp.asarray(rng.standard_normal((count, heads, 64)), jnp.float32)
    want = paged_attention(q, cache, rows, positions, tables, scale=0.2, v_dim=32)
    slots = np.asarray(tables)[0, np.arange(length) // Z] * Z + np.arange(length) % Z
    whole = [a.reshape(-1, *a.shape[2:])[slots] for a in cache]
    tiles = tiles_of(jnp.zeros(1, jnp.int32), jnp.full(1, count), count, attention.QUERY_ROWS)
    parts = []
    for begin, end in [(0, 64), (64, 192), (192, 256)]:
        k, v = (a[begin : min(end, length)] for a in whole)
        parts.append(
            attention.flash_attention(
                q,
                attention.sources(k, heads),
                attention.sources(v, heads),
                tiles,
                positions,
                None,
                span=jnp.asarray([begin, end], jnp.int32),
                scale=0.2,
                interpret=True,
            )
        )
    out, lse = (jnp.stack(p) for p in zip(*parts, strict=True))
    np.testing.assert_allclose(attention.merge(out, lse), want, atol=2e-5)
