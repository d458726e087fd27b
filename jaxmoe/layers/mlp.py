"""The gated feed-forward block of dense layers and of shared experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.ops import Ops
from jaxmoe.ffi.reference import activate
from jaxmoe.layers.linear import Linear
from jaxmoe.weights.param_spec import Formats


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), or another `activation` of the two."""

    def __init__(
        self,
        hidden_size: int,
        intermediate: int,
        formats: Formats,
        path: str,
        activation: ClampedSwiglu | None = None,
    ):
        self.activation = activation
        self.gate = Linear(hidden_size, intermediate, formats(f"{path}.gate"))
        self.up = Linear(hidden_size, intermediate, formats(f"{path}.up"))
        self.down = Linear(intermediate, hidden_size, formats(f"{path}.down"))

    def __call__(self, x: jax.Array, ops: Ops) -> jax.Array:
        """`[T, D] -> [T, D]` float32; activations are rounded to x's dtype once, before `down`."""
        gate = self.gate(x, ops, jnp.float32)
        up = self.up(x, ops, jnp.float32)
        hidden = ops.map_rows(lambda row: activate(row[0], row[1], self.activation), (gate, up))
        return self.down(hidden.astype(x.dtype), ops, jnp.float32)
