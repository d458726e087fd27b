"""The routed experts against the oracle, in both forms, on every instruction set and topology."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.native import FORMATS, MATRICES, UNGROUPED, Layer, bits, make_store, padded_columns

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi import reference
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.experts import experts_group
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.registry import NATIVE_ERRORS

FAMILIES = ("vector", "matrix")


def inputs(seed, num_tokens, hidden, num_experts, per_token, dtype=jnp.bfloat16):
    """x, ids with gaps and repeats, weights."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, num_experts, (num_tokens, per_token)).astype(np.int32)
    return (
        jnp.array(rng.standard_normal((num_tokens, hidden)), dtype),
        jnp.array(ids),
        jnp.array(rng.uniform(0.1, 1.0, ids.shape), jnp.float32),
    )


def rounds_hidden(runtime, family, weight_format, dtype):
    """Whether hidden activations are rounded to BF16 between the stages: as the kernel says."""
    name = runtime.kernel_name(family, weight_format, bf16_activations=dtype == jnp.bfloat16)
    return "_f32" not in name


def close(got, want, rounded):
    eps = 2.0**-8 if rounded else 1e-5
    np.testing.assert_allclose(got, want, rtol=0, atol=eps * float(np.abs(want).max()) + 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "weight_format, num_experts, f, d, num_tokens, per_token",
    [
        (word, *sizes)
        for word in FORMATS
        for sizes in [
            (4, 50, 70, 5, 2),
            (1, 8, 16, 1, 1),
            (16, 136, 300, 1, 8),
            (6, 128, 256, 70, 3),
        ]
        if word in UNGROUPED or sizes[0] == 4
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_experts(
    isa_runtime, family, weight_format, num_experts, f, d, num_tokens, per_token, dtype
):
    f, d = padded_columns(weight_format, f), padded_columns(weight_format, d)
    layer = Layer.random(np.random.default_rng(f), weight_format, num_experts, f, d)
    args = inputs(num_tokens, num_tokens, d, num_experts, per_token, dtype)
    want = reference.ReferenceOps([layer.weights]).experts(*args, 0)
    with make_store(isa_runtime, layer) as store:
        got = jax.jit(lambda *a: NativeOps(isa_runtime, store, family).experts(*a, 0))(*args)
        assert got.dtype == jnp.float32
        rounded = rounds_hidden(isa_runtime, family, weight_format, dtype)
        assert not (rounded and dtype == jnp.float32)
        close(got, want, rounded)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "weight_format, activation",
    [
        (word, activation)
        for word in FORMATS
        for activation in [ClampedSwiglu(1.702, 2.0), ClampedSwiglu(1.0, 2.0, 0.0), None]
        if word in UNGROUPED or activation == ClampedSwiglu(1.702, 2.0)
    ],
)
def test_biases_and_clamped_swiglu(isa_runtime, family, weight_format, activation):
    num_experts, f, d = 6, padded_columns(weight_format, 50), padded_columns(weight_format, 70)
    rng = np.random.default_rng(0)
    layer = Layer.random(rng, weight_format, num_experts, f, d)
    x, ids, weights = inputs(5, 9, d, num_experts, 3)
    ops = reference.ReferenceOps([layer.weights])
    biases = tuple(
        jnp.array(4.0 * rng.standard_normal((num_experts, f)), jnp.float32) for _ in "gu"
    )
    options = {"activation": activation, "biases": biases}
    want = ops.experts(x, ids, weights, 0, **options)
    without = ops.experts(x, ids, weights, 0, activation=activation)
    size = float(jnp.abs(want).max())
    assert float(jnp.abs(want - without).max()) > 0.1 * size
    training = reference.BatchedSequenceOps([layer.weights], 1)
    np.testing.assert_allclose(
        training.experts(x, ids, weights, 0, **options), want, rtol=1e-4, atol=1e-4 * size
    )
    with make_store(isa_runtime, layer) as store:
        got = NativeOps(isa_runtime, store, family).experts(x, ids, weights, 0, **options)
        close(got, want, rounds_hidden(isa_runtime, family, weight_format, jnp.bfloat16))
        with pytest.raises(NATIVE_ERRORS, match="the up bias"):
            wrong = (biases[0], biases[1][:, :-1])
            NativeOps(isa_runtime, store, family).experts(x, ids, weights, 0, biases=wrong)


def diagonal(codes: np.ndarray) -> Weight:
    """[1, 256, 256] FP8 with these codes on the diagonal and block scales of 0.5."""
    data = np.zeros((1, 256, 256), np.uint8)
    data[0, np.arange(256), np.arange(256)] = codes
    return Weight(jnp.array(data.view(ml_dtypes.float8_e4m3fn)), jnp.full((1, 2, 2), 0.5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
@pytest.mark.parametrize("which", ["gate", "up", "down"])
def test_every_fp8_code(isa_runtime, family, num_tokens, which):
    """Each of the 256 codes alone on its way to one output; NaN codes make their outputs NaN."""
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    nan = np.isnan(values)
    two = np.full(256, 2.0, ml_dtypes.float8_e4m3fn).view(np.uint8)  # times its scale: 1
    x = jnp.full((num_tokens, 256), 64.0, jnp.bfloat16)  # silu(64) is 64
    ids, weights = jnp.zeros((num_tokens, 1), jnp.int32), jnp.full((num_tokens, 1), 0.25)

    def run(codes):
        matrices = {
            name: diagonal(codes if name == which else two) for name in ("gate", "up", "down")
        }
        with make_store(isa_runtime, Layer("fp8_block", matrices)) as store:
            y = NativeOps(isa_runtime, store, family).experts(x, ids, weights, 0)
        return np.asarray(y)

    got = run(np.where(nan, np.uint8(0), codes))
    w = np.where(nan, 0, values).astype(np.float64) * 0.5
    if which == "gate":
        want = 0.25 * 64 * (64 * w / (1 + np.exp(np.minimum(-64 * w, 700))))
        rounded = rounds_hidden(isa_runtime, family, "fp8_block", x.dtype)
        rounding = 2.0**-8 if rounded else 1e-6
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=rounding, atol=1e-30)
        assert (got[:, w < 0] <= 0).all()
    else:
        want = (0.25 * 64 * 64 * w).astype(np.float32)
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))
    got = run(codes)
    if which == "down":
        np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(nan, got.shape))
    else:  # the NaN hidden activation meets a weight, be it zero, of every output
        assert np.isnan(got).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_format", ["bf16", "fp8_block", "int4_g32", "mxfp4"])
def test_a_token_is_the_same_bits_in_any_batch(isa_runtime, family, weight_format):
    f, d = padded_columns(weight_format, 140), padded_columns(weight_format, 200)
    layer = Layer.random(np.random.default_rng(1), weight_format, 8, f, d)
    x, ids, weights = inputs(3, 33, d, 8, 3)
    with make_store(isa_runtime, layer) as store:
        ops = NativeOps(isa_runtime, store, family)
        whole = bits(ops.experts(x, ids, weights, 0))
        for begin, end in ((0, 1), (7, 8), (4, 6), (8, 33)):
            part = ops.experts(x[begin:end], ids[begin:end], weights[begin:end], 0)
            np.testing.assert_array_equal(bits(part), whole[begin:end])
        # Buckets: the same tokens with rows of padding after them.
        padded = ops.experts(
            jnp.concatenate([x, jnp.full((31, d), jnp.nan, x.dtype)]),
            jnp.concatenate([ids, jnp.full((31, 3), -1, jnp.int32)]),
            jnp.concatenate([weights, jnp.full((31, 3), jnp.nan)]),
            0,
        )
        np.testing.assert_array_equal(bits(padded)[:33], whole)
        assert not np.asarray(padded)[33:].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_format, counted", [("fp8_block", 1), ("int4_g32", 0.5625)])
def test_threads_and_numa_nodes_do_not_change_a_bit(family, weight_format, counted):
    """counted: bytes a weight, with the scales that are placed with the rows."""
    cpus = sorted(os.sched_getaffinity(0))
    f, d = padded_columns(weight_format, 200), padded_columns(weight_format, 264)
    layer = Layer.random(np.random.default_rng(2), weight_format, 6, f, d)
    args = inputs(4, 9, d, 6, 2)
    topologies = [
        {"num_threads": 1},
        {"num_threads": 3},
        {"numa_nodes": [[cpus[0]], [cpus[-1]]]},
        {"numa_nodes": [[cpus[0]], [cpus[-1]], [cpus[0]]], "num_threads": 2},
        {"numa_nodes": [[cpus[0]], [cpus[-1]]], "num_threads": 1},
    ]
    results = []
    for topology in topologies:
        with CpuRuntime(**topology) as runtime, make_store(runtime, layer) as store:
            nodes = len(topology.get("numa_nodes", [0]))
            assert len(store.bytes_per_node()) == nodes
            assert sum(store.bytes_per_node()) == store.total_bytes == 3 * 6 * f * d * counted
            results.append(bits(NativeOps(runtime, store, family).experts(*args, 0)))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_stats_count_each_distinct_expert_once():
    layer = Layer.random(np.random.default_rng(3), "fp8_block", 4, 128, 256)
    x = jnp.ones((5, 256), jnp.bfloat16)
    ids = jnp.array([[0, 2], [2, 0], [2, -1], [-1, -1], [0, 2]], jnp.int32)
    with CpuRuntime(num_threads=1) as runtime, make_store(runtime, layer) as store:
        NativeOps(runtime, store, "vector").experts(x, ids, jnp.ones(ids.shape), 0)
        stats = runtime.stats()
    assert stats["experts_calls"] == 1 and stats["experts_distinct"] == 2
    assert stats["experts_weight_bytes"] == 2 * 3 * (128 * 256 + 4 * 2)


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_step_reads_its_distinct_experts_and_no_more(handed_over):
    """Bytes counted at batch 1 to 16: of a merged step those of the union, of an overlapped one
    those of each microbatch's.
    """
    rng = np.random.default_rng(4)
    layer = Layer.random(rng, "fp8_block", 24, 128, 256)
    expert_bytes = 3 * (128 * 256 + 4 * 2)
    with CpuRuntime(num_threads=2) as runtime, make_store(runtime, layer) as store:
        ops = NativeOps(runtime, store, "vector")
        for batch in range(1, 17):
            x, ids, weights = inputs(batch, batch, 256, 24, 4)
            before = runtime.stats()["experts_weight_bytes"]
            if handed_over:
                halves = [(x[m::2], ids[m::2], weights[m::2]) for m in range(min(batch, 2))]
                for half in halves:
                    ticket, *_ = ops.experts_submit(*half, 0)
                    jax.block_until_ready(ops.experts_wait(ticket, len(half[0]), 256))
            else:
                halves = [(x, ids, weights)]
                jax.block_until_ready(ops.experts(x, ids, weights, 0))
            read = runtime.stats()["experts_weight_bytes"] - before
            distinct = sum(len(np.unique(i[i >= 0])) for i in (np.asarray(h[1]) for h in halves))
            assert read == distinct * expert_bytes, batch


def test_submit_and_wait_give_what_experts_gives(runtime):
    """Two microbatches in flight, twice the same operands, several layers, one jit."""
    rng = np.random.default_rng(5)
    layers = [Layer.random(rng, "fp8_block", 8, 136, 256) for _ in range(2)]
    first, second = inputs(6, 4, 256, 8, 2), inputs(7, 3, 256, 8, 2)
    with make_store(runtime, *layers) as store:
        ops = NativeOps(runtime, store, "vector")

        @jax.jit
        def overlapped(first, second):
            outputs = []
            for layer in range(2):
                t1, x2 = ops.experts_submit(*first, layer, second[0])
                t2, x1 = ops.experts_submit(x2, *second[1:], layer, first[0])
                t3, x1 = ops.experts_submit(*first, layer, x1)  # equal operands: a call of its own
                y1, x2 = ops.experts_wait(t1, 4, 256, x2)
                y2, _ = ops.experts_wait(t2, 3, 256, x1)
                (y3,) = ops.experts_wait(t3, 4, 256)
                outputs.append((y1, y2, y3))
            return outputs

        before = runtime.stats()["experts_calls"]
        for _ in range(20):
            got = overlapped(first, second)
        jax.block_until_ready(got)
        assert runtime.stats()["experts_calls"] - before == 20 * 6  # none merged, none dropped
        for layer, (y1, y2, y3) in enumerate(got):
            one, two = ops.experts(*first, layer), ops.experts(*second, layer)
            for y, want in ((y1, one), (y2, two), (y3, one)):
                np.testing.assert_array_equal(bits(y), bits(want))


@pytest.mark.parametrize(
    "weight_format, num_tokens", [("bf16", 1), ("fp8_block", 1), *((x, 40) for x in FORMATS)]
)
def test_groups_of_experts_add_up_to_the_bits_of_the_whole(isa_runtime, weight_format, num_tokens):
    num_experts, held = 7, 3  # the last group has one
    f, d = padded_columns(weight_format, 50), padded_columns(weight_format, 70)
    rng = np.random.default_rng(num_tokens)
    layer = Layer.random(rng, weight_format, num_experts, f, d)
    args = inputs(3, num_tokens, d, num_experts, 4)
    biases = tuple(jnp.array(rng.standard_normal((num_experts, f)), jnp.float32) for _ in "gu")
    arrays = [layer.weights[m].data for m in MATRICES]
    if layer.weights["gate"].scale_inv is not None:
        arrays += [layer.weights[m].scale_inv for m in MATRICES]
    plain = {}
    clamped = {"activation": ClampedSwiglu(1.702, 2.0), "biases": biases}
    with make_store(isa_runtime, layer) as store:
        for family in FAMILIES:
            for options in (plain, clamped):

                @jax.jit
                def grouped(x, ids, weights, family=family, options=options):
                    y = jnp.zeros(x.shape, jnp.float32)
                    for first in range(0, num_experts, held):
                        part = slice(first, first + held)
                        y = experts_group(
                            isa_runtime,
                            family,
                            y,
                            x,
                            ids,
                            weights,
                            [a[part] for a in arrays],
                            first,
                            activation=options.get("activation"),
                            biases=tuple(b[part] for b in biases) if options else None,
                        )
                    return y

                whole = NativeOps(isa_runtime, store, family).experts(*args, 0, **options)
                assert np.abs(np.asarray(whole)).max() > 0
                np.testing.assert_array_equal(bits(grouped(*args)), bits(whole))


def test_errors_of_a_group(runtime):
    layer = Layer.random(np.random.default_rng(8), "fp8_block", 3, 16, 32)
    args = inputs(9, 2, 32, 3, 2)
    y = jnp.zeros((2, 32), jnp.float32)
    data = [layer.weights[m].data for m in MATRICES]
    scales = [layer.weights[m].scale_inv for m in MATRICES]

    def raises(match, y, arrays, kind=NATIVE_ERRORS, **options):
        with pytest.raises(kind, match=match):
            experts_group(runtime, "vector", y, *args, arrays, 0, **options).block_until_ready()

    swapped = [data[2], data[1], data[0]]
    raises(r"gate is float8_e4m3fn\[3, 32, 16\].*\[3, 32, 32\]", y, swapped + scales)
    raises(
        r"down's scales is float32\[2, 1, 1\].*\[3, 1, 1\]", y, data + [*scales[:2], scales[2][:2]]
    )
    raises(r"y is bfloat16", y.astype(jnp.bfloat16), data + scales)
    raises(
        r"the up bias is float32\[3, 8\]",
        y,
        data + scales,
        biases=(jnp.zeros((3, 16)), jnp.zeros((3, 8))),
    )
    raises("4 arrays", y, [*data, scales[0]], kind=ValueError)
    raises("without scales", y, data, kind=ValueError)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_submit_takes_biases_activations_and_packed_operands(runtime, dtype):
    """In one program, so that one's staging is not the other's."""
    rng = np.random.default_rng(11)
    layer = Layer.random(rng, "bf16", 6, 50, 70)
    args = inputs(5, 9, 70, 6, 3, dtype)
    biases = tuple(jnp.array(4.0 * rng.standard_normal((6, 50)), jnp.float32) for _ in "gu")
    options = [{}, {"biases": biases, "activation": ClampedSwiglu(1.702, 2.0)}]
    with make_store(runtime, layer) as store:
        forms = [NativeOps(runtime, store, "vector", packed=packed) for packed in (False, True)]

        @jax.jit
        def halves(args, other):
            results = []
            for option in options:
                tickets = []
                for slot, ops in enumerate(forms):
                    ticket, other = ops.experts_submit(*args, 0, other, slot=slot, **option)
                    tickets.append(ticket)
                for slot, ops in enumerate(forms):
                    y, other = ops.experts_wait(tickets[slot], 9, 70, other, slot=slot)
                    results.append(y)
            return results, other

        got, other = halves(args, jnp.arange(3))
        want = [forms[0].experts(*args, 0, **option) for option in options]
        for y, w in zip(got, (want[0], want[0], want[1], want[1]), strict=True):
            np.testing.assert_array_equal(bits(y), bits(w))
        assert not np.array_equal(bits(want[0]), bits(want[1]))
        np.testing.assert_array_equal(other, np.arange(3))
        odd = (args[0][:, :69], *args[1:])
        if dtype == jnp.bfloat16:
            with pytest.raises(ValueError, match="even number of columns"):
                forms[1].experts_submit(*odd, 0)


def test_what_is_passed_through_is_not_copied(runtime):
    layer = Layer.random(np.random.default_rng(8), "bf16", 2, 16, 32)
    args = inputs(9, 2, 32, 2, 1)
    with make_store(runtime, layer) as store:
        ops = NativeOps(runtime, store, "vector")

        @jax.jit
        def step(args, other):
            other = other + 1
            ticket, other = ops.experts_submit(*args, 0, other)
            y, other = ops.experts_wait(ticket, 2, 32, other * 2)
            return y, other + 1

        y, other = step(args, jnp.arange(5.0))
        np.testing.assert_array_equal(other, np.arange(5) * 2 + 3)
        np.testing.assert_array_equal(y, ops.experts(*args, 0))
        compiled = step.lower(args, jnp.arange(5.0)).compile().as_text()
        calls = [x for x in compiled.splitlines() if "custom-call(" in x and "jaxmoe" in x]
        assert len(calls) == 2 and all("output_to_operand_aliasing" in x for x in calls)


def test_tickets_are_good_for_one_wait(runtime):
    layer = Layer.random(np.random.default_rng(8), "bf16", 2, 16, 32)
    args = inputs(9, 2, 32, 2, 1)
    with make_store(runtime, layer) as store:
        ops = NativeOps(runtime, store, "vector")
        (ticket,) = ops.experts_submit(*args, 0)
        with pytest.raises(NATIVE_ERRORS, match=r"\[3, 32\].*\[2, 32\] was submitted"):
            jax.block_until_ready(ops.experts_wait(ticket, 3, 32))
        jax.block_until_ready(ops.experts_wait(ticket, 2, 32))
        with pytest.raises(NATIVE_ERRORS, match="not outstanding"):
            jax.block_until_ready(ops.experts_wait(ticket, 2, 32))
    with CpuRuntime(num_threads=2) as other, make_store(other, layer) as store:
        ops = NativeOps(other, store, "vector")
        for _ in range(16):
            jax.block_until_ready(ops.experts_submit(*args, 0))
        with pytest.raises(NATIVE_ERRORS, match="16 submitted calls were not waited"):
            jax.block_until_ready(ops.experts_submit(*args, 0))


def test_errors(runtime):
    layer = Layer.random(np.random.default_rng(8), "fp8_block", 3, 16, 32)
    x, ids, weights = inputs(9, 2, 32, 3, 2)
    with make_store(runtime, layer) as store:
        ops = NativeOps(runtime, store, "vector")
        error = NATIVE_ERRORS

        def raises(match, *args, layer=0, kind=error):
            with pytest.raises(kind, match=match):
                ops.experts(*args, layer).block_until_ready()

        bad = ids.at[1, 1].set(3)
        raises(r"expert_ids\[1, 1\] is 3, but MoE layer 0 has experts 0 to 2", x, bad, weights)
        raises(r"expert_ids\[0, 0\] is -2", x, ids.at[0, 0].set(-2), weights)
        raises("MoE layer 1 of a store that has 1", x, ids, weights, layer=1)
        raises(r"x is bfloat16\[2, 16\].*\[\*, 32\]", x[:, :16], ids, weights)
        raises(r"x has 1 tokens, expert_ids 2", x[:1], ids, weights, kind=ValueError)
        raises("int32 and float32", x, ids, weights.astype(jnp.bfloat16), kind=ValueError)
        call = jax.jit(lambda x: ops.experts(x, ids, weights, 0))
        call(x).block_until_ready()
    with pytest.raises(error, match="no host store has id .* closed"):
        call(x + 1).block_until_ready()
    with pytest.raises(ValueError, match="without"):
        NativeOps(runtime, None, "vector").experts(x, ids, weights, 0)


def test_an_expert_that_was_not_loaded_is_named(runtime):
    from jaxmoe.ffi.host_store import native_host_store

    x, _, weights = inputs(9, 2, 32, 3, 1)
    store = native_host_store(runtime, [(2, 16, 32, "fp8_block")], "arena")
    ids = jnp.array([[1], [-1]], jnp.int32)
    call = NativeOps(runtime, store, "vector").experts
    with pytest.raises(NATIVE_ERRORS, match="layer 0 expert 1 gate was not loaded"):
        call(x, ids, weights, 0).block_until_ready()
    store.mark_loaded(0, 1, 0)
    with pytest.raises(NATIVE_ERRORS, match="expert 1 gate has no scale yet"):
        call(x, ids, weights, 0).block_until_ready()
    assert not np.asarray(call(x, jnp.full_like(ids, -1), weights, 0)).any()
    store.close()
