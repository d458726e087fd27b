"""RMS norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.weights.param_spec import ParamSpec, new_param


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, all in FP32: callers round the result, once."""

    def __init__(self, size: int, eps: float):
        self.weight = new_param(ParamSpec((size,), "float32", "norm"))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]` float32."""
        x = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * inverse_rms * self.weight[...]
