"""The feed-forward block of a MoE layer: routed experts plus shared experts."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import MoeConfig
from jaxmoe.ffi.ops import Ops
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.mlp import Mlp
from jaxmoe.moe.router import Router
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param

Others = TypeVar("Others")


class Submitted(NamedTuple):
    """Routed experts under way, and what the rest of the block is computed from: float32
    `x [T, D]`, expert_ids and combine_weights `[T, A]`.
    """

    ticket: jax.Array
    x: jax.Array
    expert_ids: jax.Array
    combine_weights: jax.Array


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
        self,
        config: MoeConfig,
        moe_layer_idx: int,
        hidden: int,
        formats: Formats,
        path: str,
        hashed_vocab: int = 0,
    ):
        self.config = config
        self.moe_layer_idx = moe_layer_idx
        router_format = formats(f"{path}.router.logits")
        self.router = Router(config.router, hidden, router_format, hashed_vocab)
        width = config.shared_intermediate
        shared = hidden, width, formats, f"{path}.shared", config.shared_activation
        self.shared = Mlp(*shared) if width else None
        gate_format = formats(f"{path}.shared_gate") if config.shared_gate else None
        self.shared_gate = None if gate_format is None else Linear(hidden, 1, gate_format)
        sizes = config.router.num_experts, config.expert_intermediate, hidden
        self.expert_bias = ExpertBias(*sizes) if config.expert_bias else None

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        ops: Ops,
        compute_dtype: jax.typing.DTypeLike,
        token_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 `x [T, D]`, unrounded for the router; `valid [T]`; `token_ids [T]` as the router
        takes them. Float32 `[T, D]`.
        """
        if ops.splits_experts and (self.shared is not None or self.expert_bias is not None):
            submitted, _ = self.submit(
                x, valid, ops, compute_dtype, (), rest_follows=True, token_ids=token_ids
            )
            return self.wait(submitted, ops, compute_dtype)
        expert_ids, combine_weights = self.router(x, valid, ops, token_ids)
        y = ops.experts(
            x.astype(compute_dtype),
            expert_ids,
            combine_weights,
            self.moe_layer_idx,
            activation=self.config.activation,
            biases=self._biases(),
        )
        rest = self._rest(x.astype(compute_dtype), expert_ids, combine_weights, ops)
        return sum(rest, start=y)

    def submit(
        self,
        x: jax.Array,
        valid: jax.Array,
        ops: Ops,
        compute_dtype: jax.typing.DTypeLike,
        others: Others,
        *,
        slot: int = 0,
        rest_follows: bool = False,
        token_ids: jax.Array | None = None,
    ) -> tuple[Submitted, Others]:
        """Starts the routed experts; `x`, `valid` and `token_ids` as in a call.

        others: a tree of arrays passed through: what is computed from them comes after the start.
        slot: of the blocks whose experts are under way at once, each has its own.
        rest_follows: puts what `wait` computes of the block itself after the start too, at the
            price of a copy of `combine_weights` where the experts have biases.
        """
        expert_ids, combine_weights = self.router(x, valid, ops, token_ids)
        through = (x, combine_weights if self.expert_bias is not None else None)
        leaves, tree = jax.tree.flatten((others, through if rest_follows else None))
        ticket, *leaves = ops.experts_submit(
            x.astype(compute_dtype),
            expert_ids,
            combine_weights,
            self.moe_layer_idx,
            *leaves,
            slot=slot,
            activation=self.config.activation,
            biases=self._biases(),
        )
        others, ordered = jax.tree.unflatten(tree, leaves)
        if ordered is not None:
            x = ordered[0]
            combine_weights = combine_weights if ordered[1] is None else ordered[1]
        return Submitted(ticket, x, expert_ids, combine_weights), others

    def wait(
        self, submitted: Submitted, ops: Ops, compute_dtype: jax.typing.DTypeLike, *, slot: int = 0
    ) -> jax.Array:
        """The rest of the block, then the routed experts' result: what a call returns."""
        x = submitted.x.astype(compute_dtype)
        rest = self._rest(x, submitted.expert_ids, submitted.combine_weights, ops)
        num_tokens, hidden = x.shape
        y, *rest = ops.experts_wait(submitted.ticket, num_tokens, hidden, *rest, slot=slot)
        return sum(rest, start=y)

    def _biases(self) -> tuple[jax.Array, jax.Array] | None:
        bias = self.expert_bias
        return None if bias is None else (bias.gate[...], bias.up[...])

    def _rest(
        self, x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array, ops: Ops
    ) -> list[jax.Array]:
        """What is added to the routed experts' sum, in this order."""
        rest = []
        if self.expert_bias is not None:
            rest.append(self.expert_bias.of_down(expert_ids, combine_weights, ops))
        if self.shared is not None:
            shared = self.shared(x, ops)
            if self.shared_gate is not None:
                gate = self.shared_gate(x, ops, jnp.float32)  # [T, 1]
                shared = shared * ops.map_rows(jax.nn.sigmoid, gate)
            rest.append(shared)
        return rest
