"""Operations that leave the routed experts out and put aside what they need."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.ffi.ops import Ops


class DeferredOps:
    """The operations of `ops`, but for the experts, whose result counts as zero for now.

    Good for one trace of one layer. taken: the experts' input `[T, D]`, ids and weights `[T, A]`.
    """

    def __init__(self, ops: Ops):
        self._ops = ops
        self.taken: tuple[jax.Array, jax.Array, jax.Array] | tuple[()] = ()

    splits_experts = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def experts(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        **options: Any,
    ) -> jax.Array:
        assert not self.taken, "one layer's experts at a time"
        self.taken = x, expert_ids, combine_weights
        return jnp.zeros(x.shape, jnp.float32)
