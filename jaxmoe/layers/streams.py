"""Several residual streams instead of one (manifold-constrained hyper-connections, arXiv
2512.24880).

Before a block the streams are collapsed to its one input; its output is added to all of them, each
by a weight of its own, while a matrix mixes them. All weights are computed from the streams
themselves; the matrix is made doubly stochastic by Sinkhorn's iterations, so that depth does not
let the streams grow. Float32 throughout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import StreamsConfig
from jaxmoe.ffi.ops import Ops
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import rms_normalized
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param


class Streams(nnx.Module):
    """Of one block. Leaves: fn `[(2 + S) S, S D]`, base `[(2 + S) S]`, scale `[3]`."""

    def __init__(
        self, config: StreamsConfig, hidden: int, norm_eps: float, formats: Formats, path: str
    ):
        n = config.count
        self.config, self.norm_eps = config, norm_eps
        self.fn = Linear(n * hidden, (2 + n) * n, formats(f"{path}.fn"))
        self.base = new_param(ParamSpec(((2 + n) * n,), "float32", "bias"))
        self.scale = new_param(ParamSpec((3,), "float32", "norm"))

    def collapse(self, h: jax.Array, ops: Ops) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Float32 `h [T, S, D]` to a block's input `[T, D]`, and what `expand` wants: the output's
        weights `[T, S]` and the matrix `[T, S, S]`.
        """
        c, base, scale = self.config, self.base[...], self.scale[...]
        n = c.count
        raw = self.fn(_flat(h, self.norm_eps, ops), ops, jnp.float32)

        def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            raw, h = row
            into = jax.nn.sigmoid(raw[:n] * scale[0] + base[:n]) + c.eps
            out = 2.0 * jax.nn.sigmoid(raw[n : 2 * n] * scale[1] + base[n : 2 * n])
            mix = jax.nn.softmax((raw[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n), axis=-1)
            mix = mix + c.eps
            mix = mix / (mix.sum(axis=0, keepdims=True) + c.eps)

            def iterate(_: int, mix: jax.Array) -> jax.Array:
                mix = mix / (mix.sum(axis=1, keepdims=True) + c.eps)
                return mix / (mix.sum(axis=0, keepdims=True) + c.eps)

            mix = jax.lax.fori_loop(1, c.sinkhorn_iterations, iterate, mix)
            return (into[:, None] * h).sum(axis=0), out, mix

        x, out, mix = ops.map_rows(one, (raw, h))
        return x, (out, mix)

    def expand(
        self, h: jax.Array, y: jax.Array, weights: tuple[jax.Array, jax.Array], ops: Ops
    ) -> jax.Array:
        """The streams after a block that made `y [T, D]`."""

        def one(row: tuple[jax.Array, ...]) -> jax.Array:
            h, y, out, mix = row
            return out[:, None] * y + (mix[:, :, None] * h[:, None, :]).sum(axis=0)

        return ops.map_rows(one, (h, y, *weights))


class StreamsHead(nnx.Module):
    """The last collapse. Leaves: fn `[S, S D]`, base `[S]`, scale `[1]`."""

    def __init__(
        self, config: StreamsConfig, hidden: int, norm_eps: float, formats: Formats, path: str
    ):
        self.eps, self.norm_eps = config.eps, norm_eps
        self.fn = Linear(config.count * hidden, config.count, formats(f"{path}.fn"))
        self.base = new_param(ParamSpec((config.count,), "float32", "bias"))
        self.scale = new_param(ParamSpec((1,), "float32", "norm"))

    def __call__(self, h: jax.Array, ops: Ops) -> jax.Array:
        """`[T, S, D] -> [T, D]` float32."""
        base, scale = self.base[...], self.scale[...]
        raw = self.fn(_flat(h, self.norm_eps, ops), ops, jnp.float32)

        def one(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            weights = jax.nn.sigmoid(row[0] * scale + base) + self.eps
            return (weights[:, None] * row[1]).sum(axis=0)

        return ops.map_rows(one, (raw, h))


def _flat(h: jax.Array, eps: float, ops: Ops) -> jax.Array:
    return rms_normalized(h.reshape(h.shape[0], -1), eps, ops)
