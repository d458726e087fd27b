"""`kv_write` and `paged_attention` against the oracle: GQA and MLA, any packing of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import bits

from jaxmoe.ffi import attention, reference
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.ffi.registry import NATIVE_ERRORS

# name: heads N, KV heads K, head dim H, value dim, separate values
SHAPES = {
    "mha": (4, 4, 16, 16, True),
    "gqa": (8, 2, 64, 64, True),
    "odd": (6, 3, 20, 12, True),
    "mla": (5, 1, 72, 64, False),
    "wide": (70, 1, 48, 40, False),  # more heads than a group of queries holds
}


@dataclasses.dataclass
class Case:
    """Rows with cached context, and a step of packed tokens over them."""

    shape: str
    page_size: int
    contexts: list[int]  # cached positions of each row before the step
    new: list[int]  # tokens of each row in the step
    cache_dtype: type = jnp.bfloat16
    q_dtype: type = jnp.bfloat16
    padding: int = 0
    window: int | None = None
    sinks: bool = False

    def build(self, seed=0):
        rng = np.random.default_rng(seed)
        n, k, h, v, separate = SHAPES[self.shape]
        z = self.page_size
        pages_per_row = max(-(-(c + m) // z) for c, m in zip(self.contexts, self.new, strict=True))
        num_rows = len(self.contexts)
        num_pages = num_rows * pages_per_row + 1
        tables = rng.permutation(num_pages)[: num_rows * pages_per_row]
        tables = tables.reshape(num_rows, pages_per_row).astype(np.int32)
        dims = (h, v) if separate else (h,)
        # What no token may read is NaN.
        cache = [np.full((num_pages, z, k, m), np.nan, np.float32) for m in dims]
        for row, context in enumerate(self.contexts):
            for position in range(context):
                for pages in cache:
                    page = tables[row, position // z]
                    pages[page, position % z] = rng.standard_normal(pages.shape[2:])
        rows, positions = [], []
        for row, (context, count) in enumerate(zip(self.contexts, self.new, strict=True)):
            rows += [row] * count
            positions += range(context, context + count)
        rows, positions = np.array(rows + [-1] * self.padding), np.array(positions)
        positions = np.concatenate([positions, np.zeros(self.padding, int)])
        slots = np.where(rows < 0, -1, tables[rows, positions // z] * z + positions % z)
        t = len(rows)
        step = StepInputs(
            token_ids=jnp.zeros(t, jnp.int32),
            positions=jnp.array(positions, jnp.int32),
            token_rows=jnp.array(rows, jnp.int32),
            kv_slots=jnp.array(slots, jnp.int32),
            block_tables=jnp.array(tables),
        )
        q = jnp.array(rng.standard_normal((t, n, h)), self.q_dtype)
        new = [jnp.array(rng.standard_normal((t, k, m)), self.q_dtype) for m in dims]
        cache = tuple(jnp.array(pages, self.cache_dtype) for pages in cache)
        args = (q, new[0], new[1] if separate else None, cache, step)
        options = {"scale": h**-0.5, "v_dim": v, "window": self.window}
        if self.sinks:
            options["sinks"] = jnp.array(2.0 * rng.standard_normal(n), jnp.float32)
        return args, options


CASES = [
    Case("mha", 4, [0, 5], [1, 1]),
    Case("mha", 16, [0], [37], jnp.float32, jnp.float32),
    Case("gqa", 16, [0, 30, 7], [5, 1, 12], padding=3),
    Case("gqa", 16, [1100], [1]),  # chunks shared by the threads
    Case("gqa", 16, [1000, 530], [40, 3], jnp.float32, jnp.bfloat16),
    Case("odd", 3, [10, 0], [1, 9], jnp.float32, jnp.float32, padding=1),
    Case("mla", 16, [0, 40], [6, 1], jnp.bfloat16, jnp.float32),
    Case("mla", 64, [700], [2], jnp.float32, jnp.float32),
    Case("wide", 16, [20, 600], [3, 1]),
    Case("gqa", 16, [0, 30, 1100], [40, 1, 12], padding=3, window=20, sinks=True),
    Case("odd", 3, [10, 0], [1, 9], jnp.float32, jnp.float32, window=4),
    Case("gqa", 16, [1000, 530], [3, 3], jnp.float32, jnp.float32, sinks=True),
    Case("gqa", 16, [1100], [1], window=600, sinks=True),
]


@pytest.mark.parametrize("family", ["vector", "matrix"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(isa_runtime, case, family):
    args, options = case.build()
    native = NativeOps(isa_runtime, None, family)
    got, cache = jax.jit(lambda *a: native.attend(*a, **options))(*args)
    want, want_cache = reference.ReferenceOps().attend(*args, **options)
    assert got.dtype == jnp.float32
    # The matrix family may multiply BF16 queries with BF16 weights of the softmax.
    bf16 = family == "matrix" and case.cache_dtype == case.q_dtype == jnp.bfloat16
    tolerance = 2e-2 if bf16 else 2e-5
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    for pages, want_pages in zip(cache, want_cache, strict=True):
        np.testing.assert_array_equal(bits(pages), bits(want_pages))
    if case.padding:
        assert not np.asarray(got)[-case.padding :].any()


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6], CASES[8], CASES[9]], ids=str)
@pytest.mark.parametrize("family", ["vector", "matrix"])
def test_a_token_is_the_same_bits_in_any_packing(isa_runtime, case, family):
    """Alone, with its row's others, with padding: whatever the threads share."""
    (q, k_new, v_new, cache, step), options = case.build()
    whole, cache = NativeOps(isa_runtime, None, family).attend(
        q, k_new, v_new, cache, step, **options
    )

    def part(runtime, keep):
        keep = np.asarray(keep)
        return attention.paged_attention(
            runtime, q[keep], cache, step.token_rows[keep], step.positions[keep],
            step.block_tables, family=family, **options,
        )  # fmt: skip

    t = q.shape[0]
    with CpuRuntime(num_threads=1, isa=isa_runtime.isa) as single:
        for keep in ([0], [t // 2], [1, 2], list(range(t - 3, t)), list(range(0, t, 2))):
            for runtime in (isa_runtime, single):
                np.testing.assert_array_equal(
                    bits(part(runtime, keep)), bits(whole)[np.asarray(keep)]
                )


def test_donated_caches_are_written_in_place(runtime):
    args, options = Case("gqa", 16, [20], [1]).build()
    native = NativeOps(runtime, None, "vector")
    q, k_new, v_new, cache, step = args

    def two_layers(caches, q, k_new, v_new, step):
        new_caches = []
        for cache in caches:
            out, cache = native.attend(q, k_new, v_new, cache, step, **options)
            q = q + out.astype(q.dtype)
            new_caches.append(cache)
        return q, new_caches

    step_fn = jax.jit(two_layers, donate_argnums=0)
    caches = [tuple(jnp.array(c) for c in cache) for _ in range(2)]
    for _ in range(3):
        before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(caches)]
        out, caches = step_fn(caches, q, k_new, v_new, step)
        out.block_until_ready()
        assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(caches)] == before
    text = step_fn.lower(caches, q, k_new, v_new, step).compile().as_text()
    big = f"bf16[{','.join(map(str, cache[0].shape))}]"
    copies = [x for x in text.splitlines() if " copy(" in x and big in x]
    assert not copies, copies


def test_a_cache_that_is_not_donated_is_not_changed(runtime):
    args, options = Case("gqa", 16, [20], [1]).build()
    before = [np.array(c) for c in args[3]]
    NativeOps(runtime, None, "vector").attend(*args, **options)[0].block_until_ready()
    for pages, was in zip(args[3], before, strict=True):
        np.testing.assert_array_equal(bits(pages), bits(was))


def test_errors(runtime):
    args, options = Case("gqa", 16, [20, 3], [1, 2]).build()
    q, k_new, v_new, cache, step = args
    native = NativeOps(runtime, None, "vector")

    def raises(match, kind=NATIVE_ERRORS, q=q, k_new=k_new, options=options, **changes):
        changed = dataclasses.replace(step, **changes)
        with pytest.raises(kind, match=match):
            native.attend(q, k_new, v_new, cache, changed, **options)[0].block_until_ready()

    num_slots = cache[0].shape[0] * 16
    raises(
        rf"kv_slots\[1\] is {num_slots}, but the cache has slots 0 to {num_slots - 1}",
        kv_slots=step.kv_slots.at[1].set(num_slots),
    )
    raises(r"token_rows\[2\] is 2, but block_tables has 2 rows",
           token_rows=step.token_rows.at[2].set(2))  # fmt: skip
    raises(r"positions\[0\] is 32, but 2 pages of 16", positions=step.positions.at[0].set(32))
    raises(r"block_tables\[0, 1\] is -1, which position 20 of token 0 needs",
           block_tables=step.block_tables.at[0, 1].set(-1))  # fmt: skip
    raises(r"\(3, 2, 63\)", ValueError, k_new=k_new[..., :63])
    raises(r"multiple of K", ValueError, q=q[:, :7])
    raises(r"values \(5, 16, 2, 64\)", ValueError, options={**options, "v_dim": 60})
    raises(r"wanted bfloat16 or float32", q=q.astype(jnp.float16))
    # A hole in the table beyond what the step reads is no error.
    fine = dataclasses.replace(step, block_tables=step.block_tables.at[1, 1].set(-1))
    native.attend(q, k_new, v_new, cache, fine, **options)[0].block_until_ready()
