"""The page arrays of the KV cache: one allocation at the start, donated from step to step
ever after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class PageArray(Protocol):
    """One page array of a layer, as models describe it."""

    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...


def token_bytes(layers: Sequence[Sequence[PageArray]]) -> int:
    """Bytes that one position takes in all layers."""
    return sum(a.num_heads * a.head_dim * a.dtype.itemsize for layer in layers for a in layer)


def allocate(
    layers: Sequence[Sequence[PageArray]],
    num_pages: int,
    page_size: int,
    device: Device | None = None,
) -> list[tuple[jax.Array, ...]]:
    """Zeros `[P, Z, K, H]` for every page array of every layer, committed to `device` (the CPU):
    what a step returns is committed, and a first call with anything else would be compiled twice.
    """
    device = device or jax.local_devices(backend="cpu")[0]
    return [
        tuple(
            jax.device_put(
                jnp.zeros((num_pages, page_size, a.num_heads, a.head_dim), a.dtype), device
            )
            for a in layer
        )
        for layer in layers
    ]
