"""Grouped-query attention, with the knobs of `GqaConfig`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import GqaConfig, RopeConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.layers import rope
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param


class GqaAttention(nnx.Module):
    """Leaves: q, k, v, o and, with `qk_norm`, q_norm and k_norm: `[H]`, or of a whole row; with
    `sinks`, sinks `[N]`. q is `[N * H, D]`, with `output_gate` `[N * 2H, D]`. `window`: how many
    last positions a token attends, None for all.
    """

    def __init__(
        self,
        config: GqaConfig,
        rope_config: RopeConfig,
        hidden: int,
        norm_eps: float,
        formats: Formats,
        path: str,
        window: int | None = None,
        norm_offset: float = 0.0,
    ):
        c = config
        self.config = config
        self.window = window
        self.rope_config = rope_config
        q_row, kv_row, bias = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.qkv_bias
        q_out = 2 * q_row if c.output_gate else q_row
        self.q = Linear(hidden, q_out, formats(f"{path}.q"), bias=bias)
        self.k = Linear(hidden, kv_row, formats(f"{path}.k"), bias=bias)
        self.v = Linear(hidden, kv_row, formats(f"{path}.v"), bias=bias)
        self.o = Linear(q_row, hidden, formats(f"{path}.o"), bias=c.o_bias)
        sinks = ParamSpec((c.num_heads,), "float32", "bias")
        self.sinks = new_param(sinks) if c.sinks else None
        if c.qk_norm != "none":
            per_head = c.qk_norm == "head"
            self.q_norm = RMSNorm(c.head_dim if per_head else q_row, norm_eps, norm_offset)
            self.k_norm = RMSNorm(c.head_dim if per_head else kv_row, norm_eps, norm_offset)

    def __call__(
        self, x: jax.Array, cache: tuple[jax.Array, ...], step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`x [T, D]` to float32 `[T, D]` and the cache `(k, v)`, each `[P, Z, K, H]`, extended."""
        c = self.config
        num_tokens = x.shape[0]
        q, k, v = self.q(x, ops, jnp.float32), self.k(x, ops, jnp.float32), self.v(x, ops)
        gate = None
        if c.output_gate:  # each head's query and then its gate
            both = q.reshape(num_tokens, c.num_heads, 2, c.head_dim)
            q, gate = both[:, :, 0].reshape(num_tokens, -1), both[:, :, 1]
        if c.qk_norm == "row":
            q, k = self.q_norm(q, ops), self.k_norm(k, ops)
        if c.qkv_clip is not None:
            q, k, v = (jnp.clip(a, -c.qkv_clip, c.qkv_clip) for a in (q, k, v))
        q = q.reshape(num_tokens, c.num_heads, c.head_dim)
        k = k.reshape(num_tokens, c.num_kv_heads, c.head_dim)
        v = v.reshape(num_tokens, c.num_kv_heads, c.head_dim)
        if c.qk_norm == "head":
            q, k = self.q_norm(q, ops), self.k_norm(k, ops)
        attended, cache = ops.attend(
            rope.apply(q, step.positions, self.rope_config, ops).astype(x.dtype),
            rope.apply(k, step.positions, self.rope_config, ops).astype(x.dtype),
            v,
            cache,
            step,
            scale=c.softmax_scale,
            v_dim=c.head_dim,
            window=self.window,
            sinks=None if self.sinks is None else self.sinks[...],
        )  # [T, N, H]
        if gate is not None:
            attended = ops.map_rows(lambda row: row[0] * jax.nn.sigmoid(row[1]), (attended, gate))
        return self.o(attended.reshape(num_tokens, -1).astype(x.dtype), ops, jnp.float32), cache
