"""`Ops.gated_delta` in plain jnp, one token after the other: the oracle of the native operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.config.model_config import GatedDeltaConfig
from jaxmoe.ffi.ops import GatedDeltaWeights, StepInputs

NORM_EPS = 1e-6  # of the lengths of query and key


def gated_delta(
    qkv: jax.Array,
    decay_input: jax.Array,
    rate_input: jax.Array,
    weights: GatedDeltaWeights,
    cache: tuple[jax.Array, ...],
    step: StepInputs,
    config: GatedDeltaConfig,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """f32 `[T, HV, V]` and the updated cache; arguments as of `Ops.gated_delta`."""
    if step.state_from is None or step.state_to is None or step.state_saves is None:
        raise ValueError("gated_delta: the step has no state slots")
    num_slots = cache[0].shape[0]
    rows = step.token_rows
    is_first = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    own = step.state_to[jnp.maximum(rows, 0)]
    source = jnp.where(is_first, step.state_from[jnp.maximum(rows, 0)], own)
    nowhere = num_slots
    own = jnp.where((rows < 0) | (own < 0), nowhere, own)
    saves = jnp.where((rows < 0) | (step.state_saves < 0), nowhere, step.state_saves)
    decay = jnp.exp(-jnp.exp(weights.a_log) * jax.nn.softplus(decay_input + weights.dt_bias))
    rate = jax.nn.sigmoid(rate_input)

    def one_token(
        states: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        x, decay, rate, source, own, save, position, row = token
        old = tuple(s.at[source].get(mode="clip") for s in states)
        inputs, memory = (jnp.where(position == 0, 0.0, s) for s in old)
        window = jnp.concatenate([inputs, x[None]])  # [W, C]
        mixed = jax.nn.silu((window * weights.conv).sum(0))
        q, k, v = _split(mixed, config)
        memory = memory * decay[:, None, None]
        predicted = (memory * k[:, :, None]).sum(-2)  # [HV, V]
        memory = memory + k[:, :, None] * ((v - predicted) * rate[:, None])[:, None, :]
        out = (memory * q[:, :, None]).sum(-2)

        def put(state: jax.Array, new: jax.Array) -> jax.Array:
            return state.at[own].set(new, mode="drop").at[save].set(new, mode="drop")

        states = put(states[0], window[1:]), put(states[1], memory)
        return states, jnp.where(row < 0, 0.0, out)

    tokens = (qkv, decay, rate, source, own, saves, step.positions, rows)
    cache, out = jax.lax.scan(one_token, (cache[0], cache[1]), tokens)
    return out, cache


def _split(mixed: jax.Array, config: GatedDeltaConfig) -> tuple[jax.Array, ...]:
    """`[C]` to q and k, of length 1, q scaled, both `[HV, K]`, and v `[HV, V]`."""
    c = config
    key_row = c.num_key_heads * c.key_head_dim
    q, k, v = jnp.split(mixed, [key_row, 2 * key_row])
    per_key_head = c.num_value_heads // c.num_key_heads

    def unit(x: jax.Array) -> jax.Array:
        x = x.reshape(c.num_key_heads, c.key_head_dim)
        x = x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + NORM_EPS)
        return x.repeat(per_key_head, axis=0)

    return unit(q) * c.key_head_dim**-0.5, unit(k), v.reshape(c.num_value_heads, c.value_head_dim)
