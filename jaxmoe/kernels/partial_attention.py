"""Attention over one contiguous piece of keys on a GPU, for rings (attention/zigzag.py)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.ffi.ops import Weight
from jaxmoe.kernels import attention
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.grouped_matmul import Tiles, tiles_of

_ROWS = 64  # keys of a block of the kernel, which reads whole ones


class Part(NamedTuple):
    """Attention over some of the keys: float32 `[T, N, V]`, and the log of each softmax's
    denominator `[T, N]`.
    """

    out: jax.Array
    lse: jax.Array


class DeviceParts:
    """`attention.zigzag.Parts` by `flash_attention`. ops: expands latents."""

    def __init__(self, ops: DeviceOps):
        self._ops = ops

    def keys(
        self,
        q: jax.Array,
        keys: jax.Array,
        values: jax.Array | None,
        positions: jax.Array,
        count: jax.Array,
        *,
        scale: float,
        v_dim: int,
        window: int | None,
    ) -> Part:
        keys = _whole_blocks(keys)
        values = keys if values is None else _whole_blocks(values)
        num_heads = q.shape[1]
        return Part(
            *attention.flash_attention(
                q,
                attention.sources(keys, num_heads),
                attention.sources(values, num_heads, v_dim),
                _all_tokens(q),
                positions,
                None,
                span=jnp.stack([jnp.int32(0), count.astype(jnp.int32)]),
                scale=scale,
                window=window,
                interpret=self._ops.interpret,
            )
        )

    def latents(
        self,
        q: jax.Array,
        latents: jax.Array,
        positions: jax.Array,
        count: jax.Array,
        *,
        w_uk: Weight,
        w_uv: Weight,
        scale: float,
    ) -> Part:
        rows = _whole_blocks(latents[:, None])[:, 0]
        out, lse = self._ops.attend_expanded(
            q,
            lambda begin, size: rows[begin : begin + size],
            rows.shape[0],
            _all_tokens(q),
            positions,
            count,
            w_uk=w_uk,
            w_uv=w_uv,
            scale=scale,
        )
        return Part(out, lse)


def _all_tokens(q: jax.Array) -> Tiles:
    num_tokens = q.shape[0]
    ends = jnp.array([num_tokens], jnp.int32)
    return tiles_of(jnp.zeros_like(ends), ends, num_tokens, attention.QUERY_ROWS)


def _whole_blocks(array: jax.Array) -> jax.Array:
    return jnp.pad(array, ((0, -array.shape[0] % _ROWS), (0, 0), (0, 0)))
