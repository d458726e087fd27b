"""RMS norm and layer norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.ffi.ops import Ops
from jaxmoe.weights.param_spec import ParamSpec, new_param


def rms_normalized(x: jax.Array, eps: float, ops: Ops) -> jax.Array:
    """`[T, ..., D]` to x / rms(x) over the last axis, float32."""

    def one(row: jax.Array) -> jax.Array:
        mean = jnp.mean(row * row, axis=-1, keepdims=True)
        return row * jax.lax.rsqrt(mean + eps)

    return ops.map_rows(one, x.astype(jnp.float32))


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight) over the last axis, all in FP32: callers round the result,
    once.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        kind = "norm" if offset == 0.0 else "norm_offset"
        self.weight = new_param(ParamSpec((size,), "float32", kind))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array, ops: Ops) -> jax.Array:
        """`[T, ..., D] -> [T, ..., D]` float32."""
        weight = self.weight[...] + self.offset if self.offset else self.weight[...]
        return rms_normalized(x, self.eps, ops) * weight


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * weight + bias over the last axis, all in FP32."""

    def __init__(self, size: int, eps: float):
        self.weight = new_param(ParamSpec((size,), "float32", "norm"))
        self.bias = new_param(ParamSpec((size,), "float32", "bias"))
        self.eps = eps

    def __call__(self, x: jax.Array, ops: Ops) -> jax.Array:
        """`[T, ..., D] -> [T, ..., D]` float32."""

        def normalized(row: jax.Array) -> jax.Array:
            row = row - jnp.mean(row, axis=-1, keepdims=True)
            return row * jax.lax.rsqrt(jnp.mean(row * row, axis=-1, keepdims=True) + self.eps)

        return ops.map_rows(normalized, x.astype(jnp.float32)) * self.weight[...] + self.bias[...]
