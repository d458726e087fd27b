"""`linear` and `head_linear` against the oracle: shapes, types, formats, every instruction set."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.native import FORMATS, UNGROUPED, bits, linear_bound, padded_columns, random_weight

from jaxmoe.ffi import linear as linear_op
from jaxmoe.ffi import reference
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.registry import NATIVE_ERRORS
from jaxmoe.quant import formats

FAMILIES = ("vector", "matrix")


def exact(x, w: Weight) -> np.ndarray:
    dense = np.asarray(reference.dequantize(w), np.float64)
    return np.asarray(x.astype(jnp.float32), np.float64) @ dense.T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "weight_format, m, n, k",
    [
        (word, *shape)
        for word in FORMATS
        for shape in [(3, 129, 257), (1, 8, 16), (1, 300, 130), (7, 640, 384)]
        if word in UNGROUPED or shape[0] == 3
    ],
)
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
def test_linear(isa_runtime, family, weight_format, m, n, k, x_dtype):
    k = padded_columns(weight_format, k)
    rng = np.random.default_rng(m * n + k)
    w = random_weight(rng, weight_format, n, k)
    x = jnp.array(rng.standard_normal((m, k)), x_dtype)
    ops = NativeOps(isa_runtime, None, family)
    want = exact(x, w)
    for out_dtype in (jnp.float32, jnp.bfloat16):
        got = jax.jit(lambda x, w, t=out_dtype: ops.linear(x, w, t))(x, w)
        assert got.dtype == out_dtype
        assert (np.abs(np.asarray(got, np.float64) - want) <= linear_bound(x, w, out_dtype)).all()
    assert ops.linear(x, w).dtype == x_dtype


def test_rows_beyond_one_panel(isa_runtime):
    """More rows than a panel holds and more work than one thread takes."""
    rng = np.random.default_rng(5)
    w = random_weight(rng, "fp8_block", 200, 260)
    x = jnp.array(rng.standard_normal((300, 260)), jnp.bfloat16)
    for family in FAMILIES:
        got = NativeOps(isa_runtime, None, family).linear(x, w, jnp.float32)
        assert (np.abs(np.asarray(got) - exact(x, w)) <= linear_bound(x, w)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "weight_format, t, g, n, k",
    [
        (word, *shape)
        for word in FORMATS
        for shape in [(5, 4, 130, 140), (1, 3, 20, 24), (40, 16, 64, 32)]
        if word in UNGROUPED or shape[0] == 5
    ],
)
def test_head_linear(isa_runtime, family, weight_format, t, g, n, k):
    k = padded_columns(weight_format, k)
    rng = np.random.default_rng(t + g)
    w = random_weight(rng, weight_format, g, n, k)
    x = jnp.array(rng.standard_normal((t, g, k)), jnp.bfloat16)
    got = jax.jit(lambda x, w: NativeOps(isa_runtime, None, family).head_linear(x, w, jnp.float32))(
        x, w
    )
    dense = np.asarray(reference.dequantize(w), np.float64)
    want = np.einsum("tgk,gnk->tgn", np.asarray(x, np.float64), dense)
    assert (np.abs(np.asarray(got) - want) <= linear_bound(x, w)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fp8_code(isa_runtime, family):
    """y = scale * w exactly, for each of the 256 codes, alone in its row."""
    codes = np.zeros((256, 128), np.uint8)
    column = np.arange(256) * 37 % 128
    codes[np.arange(256), column] = np.arange(256)
    scale = np.array([[0.5], [3.0]], np.float32)
    w = Weight(jnp.array(codes.view(ml_dtypes.float8_e4m3fn)), jnp.array(scale))
    value = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    want = value * np.repeat(scale[:, 0], 128)
    for m in (1, 2, 5, 33):
        x = jnp.ones((m, 128), jnp.bfloat16)
        got = np.asarray(NativeOps(isa_runtime, None, family).linear(x, w, jnp.float32))
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_is_the_same_bits_in_any_batch(isa_runtime, family, weight_format):
    rng = np.random.default_rng(9)
    k = padded_columns(weight_format, 300)
    w = random_weight(rng, weight_format, 150, k)
    x = jnp.array(rng.standard_normal((37, k)), jnp.bfloat16)
    ops = NativeOps(isa_runtime, None, family)
    whole = bits(ops.linear(x, w, jnp.float32))
    for begin, end in ((0, 1), (5, 6), (3, 5), (10, 14), (20, 37)):
        part = bits(ops.linear(x[begin:end], w, jnp.float32))
        np.testing.assert_array_equal(part, whole[begin:end])


def test_errors(runtime):
    rng = np.random.default_rng(0)
    ops = NativeOps(runtime, None, "vector")
    w = random_weight(rng, "fp8_block", 16, 32)
    x = jnp.zeros((2, 32), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"\(2, 16\).*\(16, 32\)"):
        ops.linear(jnp.zeros((2, 16), jnp.bfloat16), w)
    with pytest.raises(ValueError, match="without scales; wanted fp8_block"):
        ops.linear(x, Weight(w.data))
    with pytest.raises(ValueError, match=r"float32 \[2, 1\]; wanted fp8_block: float32 \[1, 1\]"):
        ops.linear(x, Weight(w.data, jnp.ones((2, 1))))
    with pytest.raises(NATIVE_ERRORS, match="wanted bfloat16 or float32"):
        ops.linear(x.astype(jnp.float16), w).block_until_ready()
    with pytest.raises(ValueError, match="float16 .*wanted a type of bfloat16, float32"):
        ops.linear(x, Weight(w.data.astype(jnp.float16)))
    int4 = random_weight(rng, "int4_g32", 16, 32)
    with pytest.raises(ValueError, match=r"\(16, 16\) uint8"):
        ops.linear(jnp.zeros((2, 16), jnp.bfloat16), int4)


def test_the_handler_checks_by_itself(runtime):
    """Programs of other origin than ffi/linear.py get errors too, not wrong numbers."""
    x, rng = jnp.zeros((2, 32), jnp.bfloat16), np.random.default_rng(0)

    def call(*operands, code):
        return jax.ffi.ffi_call("jaxmoe_linear", jax.ShapeDtypeStruct((2, 16), jnp.float32))(
            x, *operands, runtime_id=np.int64(runtime.id), family=np.int64(0), format=np.int64(code)
        ).block_until_ready()

    fp8, int4 = (random_weight(rng, name, 16, 32) for name in ("fp8_block", "int4_g32"))
    channel, mxfp4 = formats.FORMATS["fp8_channel"].code, formats.FORMATS["mxfp4"].code
    with pytest.raises(
        NATIVE_ERRORS, match=r"scale_inv is float32\[1, 1\]; wanted float32\[16, 1\]"
    ):
        call(fp8.data, fp8.scale_inv, code=channel)
    with pytest.raises(NATIVE_ERRORS, match=r"bfloat16\[16, 1\]; wanted uint8\[16, 1\]"):
        call(int4.data, int4.scale_inv, code=mxfp4)
    with pytest.raises(NATIVE_ERRORS, match="came with 0 scale arrays; wanted 1"):
        call(int4.data, code=mxfp4)
    with pytest.raises(NATIVE_ERRORS, match="wanted uint8 of .* for format mxfp4"):
        call(fp8.data, fp8.scale_inv, code=mxfp4)
    with pytest.raises(NATIVE_ERRORS, match="weight format 11; wanted 0 to 10"):
        call(fp8.data, fp8.scale_inv, code=11)
    with pytest.raises(NATIVE_ERRORS, match="rows of 16 weights .* multiple of 32"):
        call(int4.data[:, :8], int4.scale_inv, code=mxfp4)
    with pytest.raises(ValueError, match="family"):
        NativeOps(runtime, None, "both")  # pyright: ignore[reportArgumentType]


def test_no_tokens(runtime):
    w = Weight(jnp.ones((4, 8), jnp.float32))
    assert NativeOps(runtime, None, "vector").linear(jnp.zeros((0, 8)), w).shape == (0, 4)


def test_a_closed_runtime_is_an_error_not_a_crash():
    from jaxmoe.ffi.cpu_runtime import CpuRuntime

    runtime = CpuRuntime(num_threads=1)
    w = Weight(jnp.ones((4, 8), jnp.float32))
    call = jax.jit(lambda x: linear_op.linear(runtime, "vector", x, w))
    x = jnp.ones((1, 8))
    np.testing.assert_array_equal(call(x), np.full((1, 4), 8.0))
    runtime.close()
    runtime.close()
    with pytest.raises(NATIVE_ERRORS, match="no runtime has id .* closed"):
        call(x + 1).block_until_ready()
    with pytest.raises(ValueError, match="closed"):
        runtime.describe()
