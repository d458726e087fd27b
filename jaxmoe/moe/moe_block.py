"""The feed-forward block of a MoE layer: routed experts plus shared experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import MoeConfig
from jaxmoe.ffi.ops import Ops
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.mlp import Mlp
from jaxmoe.moe.router import Router
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param


class ExpertBias(nnx.Module):
    """Leaves, float32: gate and up `[E, F]`, down `[E, D]`."""

    def __init__(self, num_experts: int, intermediate: int, hidden: int):
        self.gate = new_param(ParamSpec((num_experts, intermediate), "float32", "bias"))
        self.up = new_param(ParamSpec((num_experts, intermediate), "float32", "bias"))
        self.down = new_param(ParamSpec((num_experts, hidden), "float32", "bias"))

    def of_down(self, expert_ids: jax.Array, combine_weights: jax.Array, ops: Ops) -> jax.Array:
        """The weighted sum of the chosen experts' `down` biases, `[T, D]`."""
        down = self.down[...]

        def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            ids, weights = row
            chosen = jnp.where(ids >= 0, weights, 0.0)
            return (chosen[:, None] * down[jnp.maximum(ids, 0)]).sum(axis=0)

        return ops.map_rows(one, (expert_ids, combine_weights))


class MoeBlock(nnx.Module):
    """Leaves: router and, where the model has them, shared: all shared experts as one MLP,
    shared_gate `[1, D]`, and expert_bias. The routed experts' weights are the ops object's.
    """

    def __init__(
        self, config: MoeConfig, moe_layer_idx: int, hidden: int, formats: Formats, path: str
    ):
        self.config = config
        self.moe_layer_idx = moe_layer_idx
        self.router = Router(config.router, hidden, formats(f"{path}.router.logits"))
        width = config.shared_intermediate
        self.shared = Mlp(hidden, width, formats, f"{path}.shared") if width else None
        gate_format = formats(f"{path}.shared_gate") if config.shared_gate else None
        self.shared_gate = None if gate_format is None else Linear(hidden, 1, gate_format)
        sizes = config.router.num_experts, config.expert_intermediate, hidden
        self.expert_bias = ExpertBias(*sizes) if config.expert_bias else None

    def __call__(
        self, x: jax.Array, valid: jax.Array, ops: Ops, compute_dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """Float32 `x [T, D]`, unrounded for the router; `valid [T]`. Float32 `[T, D]`."""
        expert_ids, combine_weights = self.router(x, valid, ops)
        x = x.astype(compute_dtype)
        bias = self.expert_bias
        y = ops.experts(
            x,
            expert_ids,
            combine_weights,
            self.moe_layer_idx,
            activation=self.config.activation,
            biases=None if bias is None else (bias.gate[...], bias.up[...]),
        )
        if bias is not None:
            y = y + bias.of_down(expert_ids, combine_weights, ops)
        if self.shared is None:
            return y
        shared = self.shared(x, ops)
        if self.shared_gate is not None:
            gate = self.shared_gate(x, ops, jnp.float32)  # [T, 1]
            shared = shared * ops.map_rows(jax.nn.sigmoid, gate)
        return y + shared
