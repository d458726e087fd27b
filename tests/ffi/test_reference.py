"""The oracles against NumPy in float64, and the training form against the oracle."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.ffi import reference
from jaxmoe.ffi.ops import StepInputs, Weight
from jaxmoe.quant.formats import scale_shape


def fp8_weight(rng: np.random.Generator, *shape: int) -> Weight:
    data = rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return Weight(jnp.array(data), jnp.array(rng.uniform(0.5, 2.0, blocks), jnp.float32))


def float_weight(rng: np.random.Generator, *shape: int, dtype=jnp.float32) -> Weight:
    return Weight(jnp.array(rng.standard_normal(shape), dtype))


def test_dequantize_covers_every_fp8_code_exactly():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    data = np.tile(codes, (130, 1))  # two row blocks, two column blocks
    scale = np.array([[1.0, 0.37], [3.0, 2.0**-20]], np.float32)
    got = np.asarray(reference.dequantize(Weight(jnp.array(data), jnp.array(scale))))
    want = data.astype(np.float32) * np.repeat(np.repeat(scale, 128, 0), 128, 1)[:130]
    np.testing.assert_array_equal(got, want)
    assert np.isnan(got[0, [0x7F, 0xFF]]).all() and np.isfinite(np.delete(got[0], [127, 255])).all()


@pytest.mark.parametrize(
    "word, values",
    [
        ("int4_g32", [*range(-8, 8)]),
        ("int4_g128", [*range(-8, 8)]),
        ("mxfp4", [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
    ],
)
def test_dequantize_covers_every_nibble_in_every_group(word, values):
    """Low nibbles are even columns; each group has its own scale."""
    rng = np.random.default_rng(4)
    nibbles = np.stack([rng.permutation(np.tile(np.arange(16), 16)) for _ in range(6)])  # [6, 256]
    data = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    shape = scale_shape(word, 6, 256)
    if word == "mxfp4":
        scale = rng.integers(1, 250, shape).astype(np.uint8)
        factor = np.exp2(scale.astype(np.float64) - 127)
    else:
        scale = rng.standard_normal(shape).astype(jnp.bfloat16)
        factor = scale.astype(np.float64)
    got = np.asarray(reference.dequantize(Weight(jnp.array(data), jnp.array(scale))))
    want = np.array(values, np.float64)[nibbles] * np.repeat(factor, 256 // shape[1], 1)
    normal = np.abs(want) >= np.finfo(np.float32).tiny  # XLA may flush what is not
    np.testing.assert_array_equal(got[normal], want[normal])
    assert normal.mean() > 0.8


def test_dequantize_of_exponents_and_rows():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    data, value = np.tile(codes, (3, 1)), codes.astype(np.float64)
    powers = np.array([[127] * 8, [100, 127, 130, 20, 150, 200, 126, 128], [254] * 8], np.uint8)
    got = np.asarray(reference.dequantize(Weight(jnp.array(data), jnp.array(powers))))
    with np.errstate(over="ignore"):
        want = (value * np.repeat(np.exp2(powers.astype(np.float64) - 127), 32, 1)).astype("f4")
    np.testing.assert_array_equal(got, want)
    rows = np.array([[0.3], [-2.0], [5e-3]], np.float32)
    got = np.asarray(reference.dequantize(Weight(jnp.array(data), jnp.array(rows))))
    np.testing.assert_array_equal(got, codes.astype(np.float32) * rows)
    nan = Weight(jnp.array(data), jnp.full((3, 8), 255, jnp.uint8))
    assert np.isnan(np.asarray(reference.dequantize(nan))).all()


@pytest.mark.parametrize("make", [fp8_weight, float_weight])
def test_linear_and_head_linear(make):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 200)).astype(np.float32)
    w = make(rng, 2, 150, 200)
    dense = np.asarray(reference.dequantize(w), np.float64)
    ops = reference.ReferenceOps()
    got = ops.head_linear(jnp.array(x), w)
    np.testing.assert_allclose(got, np.einsum("tgk,gnk->tgn", x, dense), rtol=1e-4, atol=1e-4)
    scale = None if w.scale_inv is None else w.scale_inv[1]
    one = ops.linear(jnp.array(x[:, 1]), Weight(w.data[1], scale))
    np.testing.assert_allclose(one, got[:, 1], rtol=1e-5, atol=1e-5)
    half = ops.linear(jnp.array(x[:, 1], jnp.bfloat16), Weight(w.data[1], scale))
    assert half.dtype == jnp.bfloat16
    assert (
        ops.linear(jnp.array(x[:, 1]), Weight(w.data[1], scale), jnp.bfloat16).dtype == "bfloat16"
    )


def expert_layer(rng, make, num_experts=5, f=16, d=24):
    return {
        "gate": make(rng, num_experts, f, d),
        "up": make(rng, num_experts, f, d),
        "down": make(rng, num_experts, d, f),
    }


IDS = np.array([[0, 3], [4, -1], [-1, -1], [2, 2], [3, 0], [1, 4]], np.int32)


def numpy_experts(x, ids, weights, layer):
    w = {k: np.asarray(reference.dequantize(v), np.float64) for k, v in layer.items()}
    y = np.zeros(x.shape)
    for t, row in enumerate(ids):
        for a, e in enumerate(row):
            if e >= 0:
                gate, up = w["gate"][e] @ x[t], w["up"][e] @ x[t]
                y[t] += weights[t, a] * (w["down"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


@pytest.mark.parametrize("make", [fp8_weight, float_weight])
def test_experts(make):
    rng = np.random.default_rng(1)
    layer = expert_layer(rng, make)
    x = rng.standard_normal((len(IDS), 24)).astype(np.float32)
    weights = rng.uniform(0, 1, IDS.shape).astype(np.float32)
    want = numpy_experts(x, IDS, weights, layer)
    bound = 1e-5 * np.abs(want).max()
    for ops in (reference.ReferenceOps([layer]), reference.BatchedSequenceOps([layer], 2)):
        got = ops.experts(jnp.array(x), jnp.array(IDS), jnp.array(weights), 0)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=bound)
        assert not np.asarray(got)[2].any()


def test_training_experts_have_the_oracle_gradients():
    rng = np.random.default_rng(2)
    layer = expert_layer(rng, float_weight)
    # More pairs of one expert than a block holds.
    x = jnp.array(rng.standard_normal((90, 24)), jnp.float32)
    ids = jnp.array(rng.choice([0, 3], (90, 2), p=[0.95, 0.05]), jnp.int32)
    weights = jnp.array(rng.uniform(0, 1, (90, 2)), jnp.float32)

    def loss(make_ops, layer, x, weights):
        return (make_ops([layer]).experts(x, ids, weights, 0) ** 2).sum()

    grads = [
        jax.grad(lambda *a, m=make: loss(m, *a), argnums=(0, 1, 2))(layer, x, weights)
        for make in (reference.ReferenceOps, lambda e: reference.BatchedSequenceOps(e, 3))
    ]
    for want, got in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("mla", "window", "with_sinks"),
    [(False, None, False), (True, None, False), (False, 4, True), (False, None, True)],
)
def test_attend_paged_equals_whole_sequences(mla, window, with_sinks):
    """Two sequences through scattered pages in two steps equal what attention alone gives."""
    rng = np.random.default_rng(3)
    sinks = jnp.array(rng.standard_normal(6), jnp.float32) if with_sinks else None
    options = {"scale": 0.3, "window": window, "sinks": sinks}
    n, k, h, v = (6, 1, 12, 8) if mla else (6, 2, 12, 12)
    length, z = 11, 4
    q, keys = (rng.standard_normal((2 * length, m, h)).astype(np.float32) for m in (n, k))
    values = None if mla else rng.standard_normal((2 * length, k, v)).astype(np.float32)
    whole, _ = reference.BatchedSequenceOps([], 2).attend(
        jnp.array(q), jnp.array(keys), None if mla else jnp.array(values), (), None,
        v_dim=v, **options,
    )  # fmt: skip

    tables = np.array([[7, 2, 5, -1], [0, 9, 3, -1]], np.int32)
    cache = tuple(jnp.full((10, z, k, m), jnp.nan) for m in ((h,) if mla else (h, v)))
    out = np.zeros((2 * length, n, v), np.float32)
    for begin, end in ((0, 7), (7, length)):
        index = np.array([r * length + p for p in range(begin, end) for r in (1, 0)] + [0])
        rows, positions = index // length, index % length
        slots = tables[rows, positions // z] * z + positions % z
        rows[-1] = slots[-1] = -1  # padding
        step = StepInputs(
            token_ids=jnp.zeros(len(index), jnp.int32),
            positions=jnp.array(positions, jnp.int32),
            token_rows=jnp.array(rows, jnp.int32),
            kv_slots=jnp.array(slots, jnp.int32),
            block_tables=jnp.array(tables),
        )
        v_new = None if values is None else jnp.array(values[index])
        got, cache = reference.ReferenceOps().attend(
            jnp.array(q[index]), jnp.array(keys[index]), v_new, cache, step, v_dim=v, **options
        )
        assert not np.asarray(got)[-1].any()
        out[index[:-1]] = np.asarray(got)[:-1]
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-5)

    # And against float64 for one head of one token.
    t, head = length + 5, n - 1
    first = length if window is None else t + 1 - window
    kk = keys[first : t + 1, head // (n // k)].astype(np.float64)
    vv = kk[:, :v] if values is None else values[first : t + 1, head // (n // k)]
    p = np.exp(kk @ q[t, head] * 0.3)
    total = p.sum() + (0.0 if sinks is None else np.exp(float(sinks[head])))
    np.testing.assert_allclose(out[t, head], p @ vv / total, rtol=1e-5, atol=1e-5)
