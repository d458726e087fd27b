"""Products in every stored format against numpy, interpreted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from support.native import random_weight

from jaxmoe.kernels.grouped_matmul import Tiling, grouped_matmul, tiles_of
from jaxmoe.quant.dequantize import dequantize

E, N = 2, 40
TILING = Tiling(16, 32, 4, 2)


def _product(weight, x, starts, ends, dtype):
    return grouped_matmul(
        jnp.asarray(x, dtype),
        (weight.data,),
        None if weight.scale_inv is None else (weight.scale_inv,),
        tiles_of(jnp.array(starts), jnp.array(ends), x.shape[0], TILING.rows),
        tiling=TILING,
        interpret=True,
    )


@pytest.mark.parametrize(
    ("weight_format", "k"),
    [
        ("int4_g32", 96),
        ("int4_g128", 256),
        ("mxfp4", 96),
        ("mxfp8", 96),
        ("fp8_channel", 136),
        ("fp8_block", 136),
        ("bf16", 72),
    ],
)
def test_rows_meet_their_own_experts_weights(weight_format, k):
    rng = np.random.default_rng(1)
    weight = random_weight(rng, weight_format, E, N, k)
    if weight_format in ("mxfp4", "mxfp8"):  # the smallest power of two, a subnormal number
        weight.scale_inv = weight.scale_inv.at[1, 3].set(0)
    x = rng.standard_normal((32, k)).astype(np.float32)
    # Nibbles and bytes of float8 are exact in the rows' type, so that the sums alone round.
    got = np.asarray(_product(weight, x, [0, 11], [11, 30], jnp.float32))
    for expert, rows in ((0, slice(0, 11)), (1, slice(11, 30))):
        scale = None if weight.scale_inv is None else np.asarray(weight.scale_inv[expert])
        values = dequantize(weight_format, np.asarray(weight.data[expert]), scale)
        want = x[rows].astype(np.float64) @ values.T.astype(np.float64)
        np.testing.assert_allclose(got[rows], want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize("weight_format", ["int4_g32", "mxfp4"])
def test_every_code_is_exact(weight_format):
    """Rows of the identity in BF16: what comes out is the weights."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(2, axis=1)
    weight = random_weight(np.random.default_rng(2), weight_format, 1, 32, 32)
    weight.data = jnp.array(codes)
    got = _product(weight, np.eye(32, dtype=np.float32), [0], [32], jnp.bfloat16)
    want = dequantize(weight_format, codes[0], np.asarray(weight.scale_inv[0]))
    np.testing.assert_array_equal(np.asarray(got), want.T)


def test_a_scale_that_goes_with_no_format():
    weight = random_weight(np.random.default_rng(3), "int4_g32", 1, 32, 64)
    weight.scale_inv = weight.scale_inv[:, :, :1]
    with pytest.raises(ValueError, match="weights uint8 .* wanted int4_g32: bfloat16"):
        _product(weight, np.zeros((16, 64), np.float32), [0], [16], jnp.float32)
