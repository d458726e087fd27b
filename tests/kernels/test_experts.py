"""The grouped kernels against the reference, interpreted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.kernels.experts import ExpertGroup, add_group, sort_by_expert

T, A, E = 37, 3, 6


def _weights(rng, shape, fp8):
    e, n, k = shape
    if not fp8:
        return Weight(jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16))
    codes = rng.integers(0, 256, shape, np.uint8)
    codes = np.where((codes & 0x7F) == 0x7F, 0, codes)
    data = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
    blocks = e, -(-n // 128), -(-k // 128)
    return Weight(data, jnp.asarray(rng.uniform(1e-4, 1e-3, blocks), jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "d, f, fp8, special",
    [(256, 128, True, False), (192, 96, False, True), (136, 160, True, True)],
)
def test_groups_add_up_to_the_reference(dtype, d, f, fp8, special):
    rng = np.random.default_rng(0)
    layer = {
        "gate": _weights(rng, (E, f, d), fp8),
        "up": _weights(rng, (E, f, d), fp8),
        "down": _weights(rng, (E, d, f), fp8),
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
    for size, window in [(E, 128), (2, 64), (3, 16384)]:
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
