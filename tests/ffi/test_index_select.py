"""`Ops.select` against the oracle, and sparse attention against dense: any packing of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import bits

from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.ffi.registry import NATIVE_ERRORS

HEADS, DIM = 5, 48  # of the indexer
ATTENDING = (6, 40, 32)  # heads, elements of a cached key, of them values


@dataclasses.dataclass
class Rows:
    """Rows with cached context, and a step of packed tokens over them. What no token may read is
    NaN.
    """

    page_size: int
    contexts: list[int]
    new: list[int]
    dtype: Any = jnp.bfloat16
    padding: int = 0

    def build(self) -> tuple[Any, ...]:
        """Indexer's (q, weights, k_new, pages), attention's (q, k_new, cache), and the step."""
        rng, size = np.random.default_rng(0), self.page_size
        lengths = [c + n for c, n in zip(self.contexts, self.new, strict=True)]
        width = -(-max(lengths) // size) + 1  # one more than needed
        num_pages = len(lengths) * width + 1
        tables = rng.permutation(num_pages)[:-1].reshape(len(lengths), width).astype(np.int32)
        caches = [np.full((num_pages, size, 1, n), np.nan) for n in (DIM, ATTENDING[1])]
        for row, context in enumerate(self.contexts):
            for s in range(context):
                for cache in caches:
                    values = rng.standard_normal(cache.shape[3])
                    cache[tables[row, s // size], s % size, 0] = values
        rows = np.repeat(np.arange(len(lengths)), self.new)
        spans = [np.arange(c, e) for c, e in zip(self.contexts, lengths, strict=True)]
        positions = np.concatenate([*spans, np.zeros(self.padding, int)])
        rows = np.concatenate([rows, np.full(self.padding, -1)])
        slots = np.where(rows < 0, -1, tables[rows, positions // size] * size + positions % size)
        t = len(rows)
        step = StepInputs(
            jnp.zeros(t, jnp.int32),
            *(jnp.array(a, jnp.int32) for a in (positions, rows, slots)),
            jnp.array(tables),
        )

        def drawn(*shape: int, dtype: Any = self.dtype) -> jax.Array:
            return jnp.array(rng.standard_normal(shape), dtype)

        weights = drawn(t, HEADS, dtype=jnp.float32)
        pages, cache = (jnp.array(a, self.dtype) for a in caches)
        index = drawn(t, HEADS, DIM), weights, drawn(t, 1, DIM), pages
        heads, row, _ = ATTENDING
        return index, (drawn(t, heads, row), drawn(t, 1, row), None, (cache,)), step


CASES = {
    "decode": Rows(4, [90, 3, 21, 40], [1, 1, 1, 1], padding=2),
    "chunks": Rows(16, [0, 50, 7], [30, 9, 40]),
    "float32": Rows(8, [64, 0], [5, 33], jnp.float32, padding=1),
    "pages of one": Rows(1, [33], [6]),
    "long": Rows(16, [2500, 700], [3, 2]),
}


def run(ops: Any, case: Rows, top_k: int) -> tuple[Any, Any]:
    """What is selected, and what attention to it gives."""
    index, attend, step = case.build()

    def both(index: Any, attend: Any, step: StepInputs) -> Any:
        selected, pages = ops.select(*index, step, top_k=top_k)
        options = dict(scale=0.2, v_dim=ATTENDING[2], selected=selected)
        out, _ = ops.attend(*attend, step, **options)
        return selected, out, pages

    selected, out, pages = jax.jit(both)(index, attend, step)
    written = np.asarray(pages, np.float32).reshape(-1, DIM)[np.asarray(step.kv_slots)]
    new, is_token = np.asarray(index[2], np.float32)[:, 0], np.asarray(step.kv_slots) >= 0
    np.testing.assert_array_equal(written[is_token], new[is_token])
    return None if selected is None else np.asarray(selected), np.asarray(out)


@pytest.mark.parametrize("family", ["vector", "matrix"])
@pytest.mark.parametrize("name", CASES)
def test_the_oracles_positions_are_selected(name: str, family: Any, runtime):
    case = CASES[name]
    want, want_out = run(ReferenceOps(), case, 24)
    got, out = run(NativeOps(runtime, None, family), case, 24)
    np.testing.assert_array_equal(got, want)
    rows = np.asarray(case.build()[2].token_rows)
    assert (got[rows < 0] == -1).all() and (got[rows >= 0, 0] >= 0).all()
    np.testing.assert_allclose(out, want_out, atol=2e-2 if family == "matrix" else 1e-4)
    assert not out[rows < 0].any()


@pytest.mark.parametrize("family", ["vector", "matrix"])
@pytest.mark.parametrize("page_size", [16, 48])
def test_where_everything_is_selected_the_bits_are_dense_attentions(page_size, family, runtime):
    """Also beside a row that selects: the dense form is taken only where no row does."""
    ops = NativeOps(runtime, None, family)
    short = Rows(page_size, [700, 20], [4, 30])
    _, attend, step = short.build()
    options = dict(scale=0.2, v_dim=ATTENDING[2])
    dense = np.asarray(jax.jit(lambda *a: ops.attend(*a, **options)[0])(*attend, step))
    selected, alone = run(ops, short, 703)  # one row's last position is left out
    assert (selected >= 0).sum(axis=1).max() == 703
    same = np.asarray(step.positions) < 703
    assert 0 < (~same).sum() < 4
    if page_size == 16:
        np.testing.assert_array_equal(bits(alone[same]), bits(dense[same]))
    np.testing.assert_allclose(alone[same], dense[same], atol=2e-3)
    whole, out = run(ops, short, 710)
    assert whole is not None
    np.testing.assert_array_equal(bits(out[same]), bits(alone[same]))


def test_contexts_that_cannot_outgrow_the_selection_are_not_scored(runtime):
    selected, _ = run(NativeOps(runtime, None, "vector"), Rows(16, [20], [3]), 48)
    assert selected is None
    assert run(ReferenceOps(), Rows(16, [20], [3]), 48)[0] is None


def test_of_equal_scores_the_first_are_taken(runtime):
    index, _, step = Rows(4, [30], [2]).build()
    q, weights, k_new, pages = index
    same = jnp.ones_like(pages), jnp.ones_like(k_new)
    for ops in (ReferenceOps(), NativeOps(runtime, None, "vector")):
        selected, _ = ops.select(jnp.abs(q), weights, same[1], same[0], step, top_k=10)
        table = np.asarray(step.block_tables)[0]
        first = [table[s // 4] * 4 + s % 4 for s in range(10)]
        np.testing.assert_array_equal(np.asarray(selected), [first, first])


def test_a_token_selects_the_same_in_any_step(runtime):
    """Whatever is packed beside it, and however many threads share the context."""
    case = CASES["long"]
    index, _, step = case.build()
    for family in ("vector", "matrix"):
        ops = NativeOps(runtime, None, family)
        whole, _ = ops.select(*index, step, top_k=600)
        q, weights, k_new, _ = index
        pages = ops.select(*index, step, top_k=600)[1]
        for t in range(q.shape[0]):
            one = dataclasses.replace(
                step,
                **{
                    name: getattr(step, name)[t : t + 1]
                    for name in ("token_ids", "positions", "token_rows", "kv_slots")
                },
            )
            part = slice(t, t + 1)
            alone, _ = ops.select(q[part], weights[part], k_new[part], pages, one, top_k=600)
            np.testing.assert_array_equal(np.asarray(alone)[0], np.asarray(whole)[t])


def test_no_cache_is_copied(runtime):
    """Both forms of attention stand in the program, and read the cache where it lies."""
    (*index, pages), (*attend, (cache,)), step = CASES["chunks"].build()
    ops = NativeOps(runtime, None, "matrix")

    def both(index: Any, attend: Any, step: StepInputs, pages: Any, cache: Any) -> Any:
        selected, pages = ops.select(*index, pages, step, top_k=24)
        options = dict(scale=0.2, v_dim=ATTENDING[2], selected=selected)
        return ops.attend(*attend, (cache,), step, **options), pages

    jitted = jax.jit(both, donate_argnums=(3, 4))
    compiled = jitted.lower(index, attend, step, pages, cache).compile()
    text, kept = compiled.as_text(), (pages, cache)
    assert text is not None and "conditional(" in text
    for array in kept:
        shape = "bf16[" + ",".join(map(str, array.shape)) + "]"
        assert shape in text
        assert not [n for n in text.splitlines() if f"= {shape}" in n and " copy(" in n]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(a.nbytes for a in kept)


def test_bad_tables_are_refused(runtime):
    index, _, step = Rows(4, [30], [2]).build()
    ops = NativeOps(runtime, None, "vector")
    bad = dataclasses.replace(step, block_tables=step.block_tables + 100)
    with pytest.raises(NATIVE_ERRORS, match="index_select: block_tables.*the cache has pages"):
        jax.block_until_ready(ops.select(*index, bad, top_k=10))
    bad = dataclasses.replace(step, token_rows=step.token_rows + 1)
    with pytest.raises(NATIVE_ERRORS, match="index_select: token 0 is at position 30 of row 1"):
        jax.block_until_ready(ops.select(*index, bad, top_k=10))
    with pytest.raises(ValueError, match="top_k 0"):
        ops.select(*index, step, top_k=0)
