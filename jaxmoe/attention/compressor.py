"""Positions compressed to entries: the far memory of DeepSeek-V4's attention.

An entry stands for `ratio` positions: the mean of what a map makes of them, each element weighed by
a softmax over the positions. With `overlaps` the map makes two vectors a position, one for the
entry of its own positions and one for the next one's, so that an entry is made of twice as many.

The softmax is taken token by token, in a state of three numbers an element (the greatest score, the
sum of weights, the weighted sum), so that an entry is the same however a text is cut into steps and
nothing of the positions need be kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import RopeConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.layers import rope
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param

_NONE = -1e30  # below any score; minus infinity would make NaN of what it is subtracted from


def state_shape(overlaps: bool, head_dim: int) -> tuple[int, ...]:
    """Of a sequence: greatest score, weights, weighted sum of its open entries."""
    return (2 if overlaps else 1, 3, head_dim)


class Compressor(nnx.Module):
    """Leaves: kv and gate `[W H, D]` with W = 2 where entries overlap, else 1, position_bias
    `[ratio, W H]`, norm.
    """

    def __init__(
        self,
        ratio: int,
        overlaps: bool,
        head_dim: int,
        rope_config: RopeConfig,
        hidden: int,
        norm_eps: float,
        formats: Formats,
        path: str,
    ):
        self.ratio, self.rope_config = ratio, rope_config
        self.widths = 2 if overlaps else 1
        row = self.widths * head_dim
        self.kv = Linear(hidden, row, formats(f"{path}.kv"))
        self.gate = Linear(hidden, row, formats(f"{path}.gate"))
        self.position_bias = new_param(ParamSpec((ratio, row), "float32", "bias"))
        self.norm = RMSNorm(head_dim, norm_eps)

    def __call__(
        self, x: jax.Array, state: jax.Array, step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, jax.Array]:
        """`x [T, D]` and `state [slots, W, 3, H]` to float32 `[T, 1, H]`, where a token that ends
        an entry has it, normed and turned to the first of its positions, and the state, updated.
        """
        num_tokens, at = x.shape[0], jnp.maximum(step.positions, 0)
        kv = self.kv(x, ops, jnp.float32).reshape(num_tokens, self.widths, -1)
        gate = self.gate(x, ops, jnp.float32).reshape(kv.shape)
        bias = self.position_bias[...].reshape(self.ratio, self.widths, -1)
        pooled, state = _pool(kv, gate + bias[at % self.ratio], state, step, self.ratio)
        entry = self.norm(pooled, ops)[:, None]
        first = at // self.ratio * self.ratio
        return rope.apply(entry, first, self.rope_config, ops), state


def _pool(
    kv: jax.Array, scores: jax.Array, state: jax.Array, step: StepInputs, ratio: int
) -> tuple[jax.Array, jax.Array]:
    """`kv`, `scores [T, W, H]` to the open entry's mean after every token, `[T, H]`, and the
    state.
    """
    assert step.state_from is not None and step.state_to is not None
    assert step.state_saves is not None
    rows, nowhere = step.token_rows, state.shape[0]
    row = jnp.maximum(rows, 0)
    is_first = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    own = step.state_to[row]
    source = jnp.where(is_first, step.state_from[row], own)
    own = jnp.where((rows < 0) | (own < 0), nowhere, own)
    saves = jnp.where((rows < 0) | (step.state_saves < 0), nowhere, step.state_saves)
    widths, _, head_dim = state.shape[1:]
    empty = jnp.zeros((1, 3, head_dim), state.dtype).at[:, 0].set(_NONE)

    def one_token(states: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        kv, score, source, own, save, position = token
        old = states.at[source].get(mode="clip")  # [W, 3, H]
        # The entry that was next is the open one now; a text begins with neither.
        opened = jnp.concatenate([old[1:], empty])
        old = jnp.where(position % ratio == 0, opened, old)
        old = jnp.where(position == 0, jnp.broadcast_to(empty, old.shape), old)
        # Stored is the next entry's vector first.
        kv, score = kv[::-1], score[::-1]
        greatest = jnp.maximum(old[:, 0], score)
        kept, new = jnp.exp(old[:, 0] - greatest), jnp.exp(score - greatest)
        total = old[:, 1] * kept + new
        weighted = old[:, 2] * kept + new * kv
        state = jnp.stack([greatest, total, weighted], axis=1)
        states = states.at[own].set(state, mode="drop").at[save].set(state, mode="drop")
        return states, weighted[0] / total[0]

    tokens = (kv, scores, source, own, saves, step.positions)
    state, means = jax.lax.scan(one_token, state, tokens)
    return jnp.where(rows[:, None] < 0, 0.0, means), state
