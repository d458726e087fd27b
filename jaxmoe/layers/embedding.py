"""Token embedding table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.ffi.ops import Weight
from jaxmoe.quant.formats import FORMATS, WeightFormat
from jaxmoe.weights.param_spec import ParamSpec, new_param


class Embedding(nnx.Module):
    """`[V, D]`, float as stored."""

    def __init__(self, vocab_size: int, hidden_size: int, weight_format: WeightFormat):
        assert FORMATS[weight_format].scale_dtype is None
        self.data = new_param(
            ParamSpec((vocab_size, hidden_size), FORMATS[weight_format].data_dtype, "embedding")
        )

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """`[T] -> [T, D]` float32. Ids outside the table (padding) read a row of it."""
        return jnp.take(self.data[...], token_ids, axis=0, mode="clip").astype(jnp.float32)

    @property
    def weight(self) -> Weight:
        """The table as the linear map of a tied output head."""
        return Weight(self.data[...])
