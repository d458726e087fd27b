"""Linear maps as the checkpoint stores them.

A module holds a stored weight and says its shape; the arithmetic is the ops object's, but for a
bias, which is added in float32 before the result is rounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi.ops import Ops, Weight
from jaxmoe.quant.formats import FORMATS, WeightFormat, check_columns, data_shape, scale_shape
from jaxmoe.weights.param_spec import ParamKind, ParamSpec, new_param


class _StoredWeight(nnx.Module):
    """`data` and, for formats with scales, `scale_inv`, as quant/formats.py lays out a map of
    `shape [*G, N, K]`, with its leading axes.
    """

    def __init__(self, shape: tuple[int, ...], weight_format: WeightFormat, kind: ParamKind):
        *lead, n, k = shape
        info = FORMATS[weight_format]
        try:
            check_columns(weight_format, k)
        except ValueError as error:
            raise ConfigError(f"a linear map of {n} outputs: {error}") from None
        held = (*lead, *data_shape(weight_format, n, k))
        self.data = new_param(ParamSpec(held, info.data_dtype, kind))
        scales = scale_shape(weight_format, n, k)
        self.scale_inv = (
            None
            if scales is None or info.scale_dtype is None
            else new_param(ParamSpec((*lead, *scales), info.scale_dtype, "scale_inv"))
        )

    @property
    def weight(self) -> Weight:
        scale_inv = None if self.scale_inv is None else self.scale_inv[...]
        return Weight(self.data[...], scale_inv)


class Linear(_StoredWeight):
    """y = x Wᵀ with W `[out_features, in_features]`; and `bias [out_features]`, if asked for."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: WeightFormat,
        *,
        bias: bool = False,
    ):
        super().__init__((out_features, in_features), weight_format, "matrix")
        self.bias = new_param(ParamSpec((out_features,), "float32", "bias")) if bias else None

    def __call__(
        self, x: jax.Array, ops: Ops, out_dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """`[T, K] -> [T, N]`, by default in x's dtype."""
        if self.bias is None:
            return ops.linear(x, self.weight, _dtype(out_dtype))
        y = ops.linear(x, self.weight, jnp.dtype(jnp.float32)) + self.bias[...]
        return y.astype(_dtype(out_dtype) or x.dtype)


class HeadLinear(_StoredWeight):
    """One map a head: W `[num_heads, out_features, in_features]`."""

    def __init__(
        self, num_heads: int, in_features: int, out_features: int, weight_format: WeightFormat
    ):
        super().__init__((num_heads, out_features, in_features), weight_format, "head_map")

    def __call__(
        self, x: jax.Array, ops: Ops, out_dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """`[T, G, K] -> [T, G, N]`, by default in x's dtype."""
        return ops.head_linear(x, self.weight, _dtype(out_dtype))


def _dtype(dtype: jax.typing.DTypeLike | None) -> jnp.dtype | None:
    return None if dtype is None else jnp.dtype(dtype)
