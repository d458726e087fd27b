"""The grouped kernels against the reference, interpreted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import random_weight

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.kernels.experts import ExpertGroup, add_group, sort_by_expert

T, A, E = 37, 3, 6


def _weights(rng, shape, weight_format):
    e, n, k = shape
    if weight_format == "bf16":
        return Weight(jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16))
    if weight_format != "fp8_block":
        weight = random_weight(rng, weight_format, *shape)
        small = weight.scale_inv // 2 + 58 if weight_format == "mxfp4" else weight.scale_inv / 32
        return Weight(weight.data, small.astype(weight.scale_inv.dtype))
    codes = rng.integers(0, 256, shape, np.uint8)
    codes = np.where((codes & 0x7F) == 0x7F, 0, codes)
    data = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
    blocks = e, -(-n // 128), -(-k // 128)
    return Weight(data, jnp.asarray(rng.uniform(1e-4, 1e-3, blocks), jnp.float32))


@pytest.mark.parametrize(
    "dtype, d, f, weight_format, special",
    [
        (jnp.float32, 136, 160, "fp8_block", True),
        (jnp.bfloat16, 256, 128, "fp8_block", False),
        (jnp.float32, 96, 64, "mxfp4", True),
        pytest.param(jnp.float32, 96, 64, "int4_g32", False, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 96, 64, "int4_g32", False, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 96, 64, "fp8_channel", False, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 192, 96, "bf16", True, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 136, 160, "fp8_block", True, marks=pytest.mark.slow),
    ],
)
def test_groups_add_up_to_the_reference(dtype, d, f, weight_format, special):
    rng = np.random.default_rng(0)
    layer = {
        "gate": _weights(rng, (E, f, d), weight_format),
        "up": _weights(rng, (E, f, d), weight_format),
        "down": _weights(rng, (E, d, f), weight_format),
    }
    x = jnp.asarray(rng.standard_normal((T, d)), dtype)
    ids = np.stack([rng.permutation(E - 1)[:A] for _ in range(T)]).astype(np.int32)  # one idle
    ids[5] = -1
    weights = jnp.asarray(rng.uniform(0.1, 1, (T, A)), jnp.float32)
    activation = ClampedSwiglu(1.702, 7.0) if special else None
    biases = None
    if special:
        biases = tuple(jnp.asarray(rng.standard_normal((E, f)), jnp.float32) for _ in range(2))
    want = ReferenceOps([layer]).experts(
        x, jnp.asarray(ids), weights, 0, activation=activation, biases=biases
    )
    for size, window in [(2, 64), (3, 16384)]:
        routing = sort_by_expert(jnp.asarray(ids), weights, E, window)
        y = jnp.zeros((T, d), jnp.float32)
        for first in range(0, E, size):
            part = slice(first, first + size)
            group = ExpertGroup(
                *(layer[m].data[part] for m in ("gate", "up", "down")),
                *(
                    None if layer[m].scale_inv is None else layer[m].scale_inv[part]
                    for m in ("gate", "up", "down")
                ),
            )
            y = add_group(
                y,
                x,
                routing,
                group,
                first,
                activation=activation,
                biases=None if biases is None else (biases[0][part], biases[1][part]),
                window=window,
                interpret=True,
            )
        scale = float(jnp.abs(want).max())
        bound = 2e-2 if dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(y, want, atol=bound * scale)
        assert not np.asarray(y[5]).any()
