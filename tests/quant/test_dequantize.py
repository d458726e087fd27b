"""Values of every format in numpy: every code, and the same as the kernels' oracle."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.ffi import reference
from jaxmoe.ffi.ops import Weight
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.formats import FORMATS, WeightFormat, data_shape, scale_shape

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def nibbles(codes: list[int]) -> np.ndarray:
    """One row, low nibble first."""
    row = np.array(codes, np.uint8)
    return (row[0::2] | (row[1::2] << 4))[None]


@pytest.mark.parametrize("group", [32, 128])
def test_int4_codes(group: int):
    codes = [i % 16 for i in range(group)]
    scale = np.array([[3.0]], ml_dtypes.bfloat16)
    word: WeightFormat = "int4_g32" if group == 32 else "int4_g128"
    values = dequantize(word, nibbles(codes), scale)
    assert values.dtype == np.float32 and values.shape == (1, group)
    assert values[0, :16].tolist() == [3.0 * (code - 8) for code in range(16)]


@pytest.mark.parametrize("zero", range(17))
def test_uint4_codes_and_zero_points(zero: int):
    word = np.array([[3.0]], np.float32).view(np.uint32) | np.uint32(zero)
    for weight_format, group in (("uint4_g32", 32), ("uint4_g128", 128)):
        values = dequantize(weight_format, nibbles([i % 16 for i in range(group)]), word)
        assert values[0, :16].tolist() == [3.0 * (code - zero) for code in range(16)]


def test_nvfp4_codes_scales_and_factors():
    scales = np.array([[1.5, 2.0**-9, 448.0]], ml_dtypes.float8_e4m3fn).view(np.uint8)
    factor = np.array([[0.25]], np.float32).view(np.uint8)
    held = np.concatenate([scales, factor], axis=1)
    values = dequantize("nvfp4", nibbles([*range(16)] * 3), held)
    for group, scale in enumerate((1.5, 2.0**-9, 448.0)):
        wanted = [value * scale / 4 for value in FP4]
        assert values[0, 16 * group : 16 * group + 16].tolist() == wanted


def test_mxfp4_codes_and_scales():
    codes = [*range(16), *range(16)] * 2
    values = dequantize("mxfp4", nibbles(codes), np.array([[127, 124]], np.uint8))
    assert values[0, :16].tolist() == FP4
    assert values[0, 32:48].tolist() == [value / 8 for value in FP4]
    assert np.signbit(values[0, 8])
    ends = dequantize("mxfp4", nibbles([2] * 64), np.array([[0, 254]], np.uint8))
    assert ends[0, 0] == 2.0**-127 and ends[0, 32] == 2.0**127


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_oracle_says_the_same(weight_format: WeightFormat):
    rng = np.random.default_rng(0)
    info, (n, k) = FORMATS[weight_format], (130, 384)
    dtype, shape = np.dtype(jnp.dtype(info.data_dtype)), data_shape(weight_format, n, k)
    if info.bits == 4:
        data = rng.integers(0, 256, shape, np.uint8)
    else:
        data = rng.standard_normal(shape).astype(dtype)
    scales, scale = scale_shape(weight_format, n, k), None
    if scales is not None:
        scale = rng.uniform(0.5, 2.0, scales).astype(np.dtype(jnp.dtype(info.scale_dtype)))
        if info.scale_dtype == "uint8":
            scale = rng.integers(100, 127 if info.tail_cols else 150, scales).astype(np.uint8)
        if info.tail_cols:
            factors = rng.uniform(0.5, 2.0, (n, 1)).astype(np.float32)
            scale[:, -info.tail_cols :] = factors.view(np.uint8)
        if info.scale_dtype == "uint32":
            words = rng.uniform(0.5, 2.0, scales).astype(np.float16).astype(np.float32)
            scale = words.view(np.uint32) | rng.integers(0, 17, scales, np.uint32)
    oracle = reference.dequantize(
        Weight(jnp.asarray(data), None if scale is None else jnp.asarray(scale))
    )
    np.testing.assert_array_equal(dequantize(weight_format, data, scale), np.asarray(oracle))
