"""Residual streams: what holds of them whatever the weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config.model_config import StreamsConfig
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.layers.streams import Streams

OPS = ReferenceOps()


def test_the_matrix_is_doubly_stochastic_and_keeps_the_streams_sum():
    rng = np.random.default_rng(0)
    streams = Streams(StreamsConfig(4, 20, 1e-6), 8, 1e-6, lambda path: "f32", "s")
    streams.fn.data = nnx.Param(jnp.asarray(0.1 * rng.standard_normal((24, 32)), jnp.float32))
    streams.base = nnx.Param(jnp.asarray(0.5 * rng.standard_normal(24), jnp.float32))
    streams.scale = nnx.Param(jnp.ones(3, jnp.float32))
    h = jnp.asarray(rng.standard_normal((5, 4, 8)), jnp.float32)
    x, (out, mix) = streams.collapse(h, OPS)
    assert x.shape == (5, 8) and float(out.min()) > 0.0 and float(out.max()) < 2.0
    np.testing.assert_allclose(mix.sum(axis=1), 1.0, atol=1e-3)
    np.testing.assert_allclose(mix.sum(axis=2), 1.0, atol=1e-3)
    mixed = streams.expand(h, jnp.zeros_like(x), (out, mix), OPS)
    np.testing.assert_allclose(mixed.sum(axis=1), h.sum(axis=1), atol=2e-2)
    # The first axis of the matrix is the stream it comes from.
    only = jnp.zeros_like(h).at[:, 1].set(1.0)
    spread = streams.expand(only, jnp.zeros_like(x), (out, mix), OPS)
    np.testing.assert_allclose(spread[:, :, 0], mix[:, 1], rtol=1e-6)
