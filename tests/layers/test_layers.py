"""Linear, norm, embedding and MLP modules: what they hold, and their arithmetic against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.layers.embedding import Embedding
from jaxmoe.layers.linear import HeadLinear, Linear
from jaxmoe.layers.mlp import Mlp
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import describe

OPS = ReferenceOps()
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_linear_describes_stored_weights():
    specs = describe(lambda: Linear(256, 576, "fp8_block")).specs
    assert specs["data"].shape == (576, 256) and specs["data"].dtype == "float8_e4m3fn"
    assert specs["scale_inv"].shape == (5, 2) and specs["scale_inv"].kind == "scale_inv"
    assert set(describe(lambda: Linear(256, 576, "bf16")).specs) == {"data"}
    head = describe(lambda: HeadLinear(4, 128, 512, "fp8_block")).specs
    assert head["data"].shape == (4, 512, 128) and head["scale_inv"].shape == (4, 4, 1)


@pytest.mark.parametrize("out_dtype", [None, jnp.float32, "float32"])
def test_linear(out_dtype: object):
    layer = Linear(6, 5, "f32")
    layer.data.set_value(normal(5, 6))
    x = normal(3, 6).astype(jnp.bfloat16)
    y = layer(x, OPS, out_dtype)
    assert y.dtype == (jnp.bfloat16 if out_dtype is None else jnp.float32)
    expected = np.asarray(x, np.float32) @ np.asarray(layer.data[...]).T
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_a_bias_is_added_before_rounding(out_dtype: str | None):
    layer = Linear(6, 5, "f32", bias=True)
    layer.data.set_value(normal(5, 6))
    assert layer.bias is not None
    layer.bias.set_value(normal(5))
    x = normal(3, 6).astype(jnp.bfloat16)
    y = layer(x, OPS, out_dtype)
    exact = jnp.asarray(x, jnp.float32) @ layer.data[...].T + layer.bias[...]
    expected = exact.astype(out_dtype or jnp.bfloat16)
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected), rtol=1e-6)
    assert describe(lambda: Linear(6, 5, "bf16", bias=True)).specs["bias"].dtype == "float32"


def test_head_linear_uses_each_heads_own_map():
    layer = HeadLinear(2, 4, 3, "f32")
    layer.data.set_value(normal(2, 3, 4))
    x = normal(5, 2, 4)
    for g in range(2):
        expected = np.asarray(x)[:, g] @ np.asarray(layer.data[...])[g].T
        np.testing.assert_allclose(layer(x, OPS)[:, g], expected, rtol=1e-5, atol=1e-6)


def test_norm_is_float32_to_the_end():
    layer = RMSNorm(8, 1e-2)
    layer.weight.set_value(normal(8))
    x = normal(2, 3, 8).astype(jnp.bfloat16)
    y = layer(x, OPS)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-2)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact * np.asarray(layer.weight[...]), rtol=1e-6)


def test_embedding_reads_rows_and_survives_padding():
    layer = Embedding(7, 4, "bf16")
    layer.data.set_value(normal(7, 4).astype(jnp.bfloat16))
    rows = np.asarray(layer(jnp.asarray([3, 0, 6, -1, 99])))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[:3], np.asarray(layer.data[...], np.float32)[[3, 0, 6]])
    assert np.isfinite(rows).all()


def test_mlp():
    layer = Mlp(4, 6, lambda path: {"m.gate": "f32", "m.up": "f32", "m.down": "f32"}[path], "m")
    for linear in (layer.gate, layer.up, layer.down):
        linear.data.set_value(normal(*linear.data.shape))
    x = np.asarray(normal(3, 4))
    gate, up = (x @ np.asarray(w.data[...]).T for w in (layer.gate, layer.up))
    expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(layer.down.data[...]).T
    np.testing.assert_allclose(layer(jnp.asarray(x), OPS), expected, rtol=1e-4, atol=1e-5)
