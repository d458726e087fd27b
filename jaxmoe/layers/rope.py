"""Rotary position embedding, plain and YaRN-extended (arXiv 2309.00071).

Angles are computed from positions inside the program, in float32, so no table limits the context.
Frequencies are constants of the configuration.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import RopeConfig, YarnScaling
from jaxmoe.ffi.ops import Ops


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """Radians per position of each pair of dimensions: `[dim / 2]` float32."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    plain = rope.theta**-exponents
    if rope.scaling is None:
        return plain.astype(np.float32)
    # Fast pairs keep their frequency, slow pairs are interpolated to the longer context, between a
    # ramp.
    low, high = _ramp_bounds(rope, rope.scaling)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0.0, 1.0)
    return (plain * (1.0 - ramp) + plain / rope.scaling.factor * ramp).astype(np.float32)


def _ramp_bounds(rope: RopeConfig, yarn: YarnScaling) -> tuple[float, float]:
    def pair_turning(num_turns: float) -> float:
        """The pair index that makes `num_turns` turns over the original context."""
        ratio = yarn.original_max_position / (num_turns * 2.0 * math.pi)
        return rope.dim * math.log(ratio) / (2.0 * math.log(rope.theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    return low, high + 0.001 if high == low else high


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: sharper attention over the longer context."""
    yarn = rope.scaling
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0 if yarn.factor > 1.0 else 1.0

    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        # The part that concerns all dimensions is in the softmax scale instead.
        return mscale(yarn.mscale) / mscale(yarn.mscale_all_dim)
    return mscale(1.0)


def cos_sin(positions: jax.Array, rope: RopeConfig) -> tuple[jax.Array, jax.Array]:
    """Positions `[T]` to cos and sin `[T, dim / 2]` float32."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rope)
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply(x: jax.Array, positions: jax.Array, rope: RopeConfig, ops: Ops) -> jax.Array:
    """`x [T, N, H]` with its first `dim` elements, or its last, rotated to `positions [T]`, as
    `rotate` does; float32.
    """
    if rope.at_end and rope.dim < x.shape[-1]:
        rest = x.shape[-1] - rope.dim
        turned = apply(x[..., rest:], positions, rope, ops)
        return jnp.concatenate([x[..., :rest].astype(jnp.float32), turned], axis=-1)
    if rope.dim < x.shape[-1]:
        turned = apply(x[..., : rope.dim], positions, rope, ops)
        return jnp.concatenate([turned, x[..., rope.dim :].astype(jnp.float32)], axis=-1)

    def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        cos, sin = cos_sin(row[1][None], rope)
        return rotate(row[0][None], cos, sin, interleaved=rope.interleaved)[0]

    return ops.map_rows(one, (x, positions))


def undo(x: jax.Array, positions: jax.Array, rope: RopeConfig, ops: Ops) -> jax.Array:
    """`x [T, N, H]`, whose last `dim` elements are as `apply` leaves them, turned back from
    `positions [T]`, pairs where they were before; float32.
    """
    assert rope.at_end and rope.interleaved
    rest = x.shape[-1] - rope.dim

    def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        cos, sin = cos_sin(row[1][None], rope)
        first, second = jnp.split(row[0].astype(jnp.float32)[:, rest:], 2, axis=-1)
        pairs = first * cos + second * sin, second * cos - first * sin
        back = jnp.stack(pairs, axis=-1).reshape(-1, rope.dim)
        return jnp.concatenate([row[0][:, :rest], back], axis=-1)

    return ops.map_rows(one, (x, positions))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotates the pairs of `x [T, N, dim]`; float32.

    Pairs are neighbours (2i, 2i+1) when interleaved, else (i, i + dim/2). The result keeps the
    first members in its first half in both cases: queries and keys only ever meet each other.
    """
    x = x.astype(jnp.float32)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
