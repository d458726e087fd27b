"""The feed-forward block of a MoE layer: routed experts plus shared experts."""

from __future__ import annotations

import jax
from flax import nnx

from jaxmoe.config.model_config import MoeConfig
from jaxmoe.ffi.ops import Ops
from jaxmoe.layers.mlp import Mlp
from jaxmoe.moe.router import Router
from jaxmoe.weights.param_spec import Formats


class MoeBlock(nnx.Module):
    """Leaves: router and, where the model has them, shared: all shared experts as one MLP."""

    def __init__(
        self, config: MoeConfig, moe_layer_idx: int, hidden: int, formats: Formats, path: str
    ):
        self.moe_layer_idx = moe_layer_idx
        self.router = Router(config.router, hidden, formats(f"{path}.router.logits"))
        width = config.shared_intermediate
        self.shared = Mlp(hidden, width, formats, f"{path}.shared") if width else None

    def __call__(
        self, x: jax.Array, valid: jax.Array, ops: Ops, compute_dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """Float32 `x [T, D]`, unrounded for the router; `valid [T]`. Float32 `[T, D]`."""
        expert_ids, combine_weights = self.router(x, valid, ops)
        x = x.astype(compute_dtype)
        y = ops.experts(x, expert_ids, combine_weights, self.moe_layer_idx)
        return y if self.shared is None else y + self.shared(x, ops)
