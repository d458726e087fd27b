"""Gated DeltaNet: linear attention whose memory forgets and corrects itself (arXiv 2412.06464).

Instead of keys and values of every token, a sequence has one matrix a head and the convolution's
last inputs, both float32, in its slot of the state arrays. Convolution and recurrence are one
operation (`Ops.gated_delta`); here are the maps before and after it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import GatedDeltaConfig
from jaxmoe.ffi.ops import GatedDeltaWeights, Ops, StepInputs
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param


class GatedDeltaAttention(nnx.Module):
    """Leaves: qkvz, ba | qkv, z, b, a; conv `[W, C]`, a_log and dt_bias `[HV]`, norm, out."""

    def __init__(
        self, config: GatedDeltaConfig, hidden: int, norm_eps: float, formats: Formats, path: str
    ):
        c = config
        self.config = config
        if c.fused_projections:
            qkvz, ba = c.conv_channels + c.value_row, 2 * c.num_value_heads
            self.qkvz = Linear(hidden, qkvz, formats(f"{path}.qkvz"))
            self.ba = Linear(hidden, ba, formats(f"{path}.ba"))
        else:
            self.qkv = Linear(hidden, c.conv_channels, formats(f"{path}.qkv"))
            self.z = Linear(hidden, c.value_row, formats(f"{path}.z"))
            self.b = Linear(hidden, c.num_value_heads, formats(f"{path}.b"))
            self.a = Linear(hidden, c.num_value_heads, formats(f"{path}.a"))
        per_head = ParamSpec((c.num_value_heads,), "float32", "bias")
        self.conv = new_param(ParamSpec((c.conv_width, c.conv_channels), "float32", "conv"))
        self.a_log, self.dt_bias = new_param(per_head), new_param(per_head)
        self.norm = RMSNorm(c.value_head_dim, norm_eps)
        self.out = Linear(c.value_row, hidden, formats(f"{path}.out"))

    def __call__(
        self, x: jax.Array, cache: tuple[jax.Array, ...], step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`x [T, D]` to float32 `[T, D]` and the cache `(conv_state, delta_state)`, updated."""
        qkv, z, b, a = self._project(x, ops)
        weights = GatedDeltaWeights(self.conv[...], self.a_log[...], self.dt_bias[...])
        y, cache = ops.gated_delta(qkv, a, b, weights, cache, step, self.config)  # [T, HV, V]
        gate = z.reshape(y.shape)
        y = ops.map_rows(lambda row: row[0] * jax.nn.silu(row[1]), (self.norm(y, ops), gate))
        return self.out(y.reshape(x.shape[0], -1).astype(x.dtype), ops, jnp.float32), cache

    def _project(self, x: jax.Array, ops: Ops) -> tuple[jax.Array, ...]:
        """Float32 qkv `[T, C]`, output gate z `[T, HV * V]`, rate b and decay a `[T, HV]`."""
        if not self.config.fused_projections:
            return tuple(map_(x, ops, jnp.float32) for map_ in (self.qkv, self.z, self.b, self.a))
        c, num_tokens = self.config, x.shape[0]
        qkvz = self.qkvz(x, ops, jnp.float32).reshape(num_tokens, c.num_key_heads, -1)
        b_and_a = self.ba(x, ops, jnp.float32).reshape(num_tokens, c.num_key_heads, 2, -1)
        values = c.value_row // c.num_key_heads  # elements of a key head's values
        ends = (c.key_head_dim, 2 * c.key_head_dim, 2 * c.key_head_dim + values)
        q, k, v, z = (part.reshape(num_tokens, -1) for part in jnp.split(qkvz, ends, axis=-1))
        b, a = (b_and_a[:, :, i].reshape(num_tokens, -1) for i in (0, 1))
        return jnp.concatenate([q, k, v], axis=-1), z, b, a
