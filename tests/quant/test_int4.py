"""Rounding to INT4: as near as the format allows, exact where it can be, and honest about it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.int4 import Int4Format, quantize_int4

FORMATS: tuple[Int4Format, ...] = ("int4_g32", "int4_g128")


@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_int4_already_comes_back(weight_format: Int4Format):
    rng = np.random.default_rng(0)
    group = 32 if weight_format == "int4_g32" else 128
    codes = rng.integers(-8, 8, (5, 2, group)).astype(np.float32)
    codes[..., 0] = -8  # so that the scale can be told
    scale = rng.uniform(-2, 2, (5, 2, 1)).astype(ml_dtypes.bfloat16).astype(np.float32)
    w = (codes * scale).reshape(5, 2 * group)
    made = quantize_int4(w, weight_format)
    assert made.error == 0.0 and made.total > 0
    np.testing.assert_array_equal(dequantize(weight_format, made.data, made.scale), w)


@pytest.mark.parametrize(("weight_format", "most"), [("int4_g32", 0.085), ("int4_g128", 0.1)])
def test_error_of_normal_weights(weight_format: Int4Format, most: float):
    w = np.random.default_rng(1).standard_normal((64, 1024), np.float32) * 0.02
    made = quantize_int4(w, weight_format)
    held = dequantize(weight_format, made.data, made.scale)
    assert made.scale.dtype == ml_dtypes.bfloat16 and made.data.dtype == np.uint8
    error = np.square(held - w, dtype=np.float64).sum()
    assert made.error == pytest.approx(error) and made.total == pytest.approx(
        (w**2).sum(), rel=1e-5
    )
    assert 0.07 < (made.error / made.total) ** 0.5 < most
    # The farthest off is an extreme on the other side than the one that became -8.7: it is 7.
    step = np.abs(made.scale.astype(np.float32)).repeat(1024 // made.scale.shape[1], axis=1)
    assert (np.abs(held - w) <= 1.75 * step).all()
    assert (np.abs(held - w) <= 0.51 * step).mean() > 0.98


def test_zeros_and_what_is_too_small_for_a_scale():
    w = np.zeros((2, 64), np.float32)
    w[1, 32:] = 1e-39
    made = quantize_int4(w, "int4_g32")
    assert not dequantize("int4_g32", made.data, made.scale).any()
    assert (made.data == 0x88).all() and made.error > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value: float):
    w = np.ones((1, 32), np.float32)
    w[0, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_int4(w, "int4_g32")


def test_rows_without_whole_groups_are_refused():
    with pytest.raises(ValueError, match="128.*160"):
        quantize_int4(np.ones((1, 160), np.float32), "int4_g128")
