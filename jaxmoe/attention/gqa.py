"""Grouped-query attention with per-head RMS norm of queries and keys (Qwen3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import GqaConfig, RopeConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.layers import rope
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import Formats


class GqaAttention(nnx.Module):
    """Leaves: q, k, v, o and, with `qk_norm`, q_norm and k_norm `[H]`."""

    def __init__(
        self,
        config: GqaConfig,
        rope_config: RopeConfig,
        hidden: int,
        norm_eps: float,
        formats: Formats,
        path: str,
    ):
        c = config
        self.config = config
        self.rope_config = rope_config
        self.q = Linear(hidden, c.num_heads * c.head_dim, formats(f"{path}.q"))
        self.k = Linear(hidden, c.num_kv_heads * c.head_dim, formats(f"{path}.k"))
        self.v = Linear(hidden, c.num_kv_heads * c.head_dim, formats(f"{path}.v"))
        self.o = Linear(c.num_heads * c.head_dim, hidden, formats(f"{path}.o"))
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, norm_eps)
            self.k_norm = RMSNorm(c.head_dim, norm_eps)

    def __call__(
        self, x: jax.Array, cache: tuple[jax.Array, ...], step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`x [T, D]` to float32 `[T, D]` and the cache `(k, v)`, each `[P, Z, K, H]`, extended."""
        c = self.config
        num_tokens = x.shape[0]
        q = self.q(x, ops, jnp.float32).reshape(num_tokens, c.num_heads, c.head_dim)
        k = self.k(x, ops, jnp.float32).reshape(num_tokens, c.num_kv_heads, c.head_dim)
        v = self.v(x, ops).reshape(num_tokens, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q, ops), self.k_norm(k, ops)
        attended, cache = ops.attend(
            rope.apply(q, step.positions, self.rope_config, ops).astype(x.dtype),
            rope.apply(k, step.positions, self.rope_config, ops).astype(x.dtype),
            v,
            cache,
            step,
            scale=c.softmax_scale,
            v_dim=c.head_dim,
        )  # [T, N, H]
        return self.o(attended.reshape(num_tokens, -1).astype(x.dtype), ops, jnp.float32), cache
