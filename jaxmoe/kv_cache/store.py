"""The arrays a model's layers remember in, pages of keys and values or recurrent states: one
allocation at the start, donated from step to step ever after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.device_driver import Device


class PageArray(Protocol):
    """One page array of a layer, as models describe it."""

    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    def slots(self, page_size: int) -> int: ...


class StateArray(Protocol):
    """One state array of a layer, as models describe it: the shape of one slot."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


def slot_bytes(layers: Sequence[Sequence[StateArray]]) -> int:
    """Bytes that one sequence's recurrent state takes in all layers."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for layer in layers for a in layer)


def token_bytes(layers: Sequence[Sequence[PageArray]], page_size: int) -> int:
    """Bytes that one position takes in all layers, of a page's rounded up."""
    page_bytes = sum(
        a.slots(page_size) * a.num_heads * a.head_dim * a.dtype.itemsize
        for layer in layers
        for a in layer
    )
    return -(-page_bytes // page_size)


def allocate(
    layers: Sequence[Sequence[PageArray]],
    num_pages: int,
    page_size: int,
    states: Sequence[Sequence[StateArray]] | None = None,
    num_slots: int = 0,
    *,
    device: Device | None = None,
) -> list[tuple[jax.Array, ...]]:
    """Zeros `[P, slots, K, H]` for every page array and `[num_slots, ...]` for every state array of
    every layer, committed to `device` (the CPU): what a step returns is committed, and a first call
    with anything else would be compiled twice.
    """
    device = device or jax.local_devices(backend="cpu")[0]

    def zeros(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
        return jax.device_put(jnp.zeros(shape, dtype), device)

    if states is None:
        states = [()] * len(layers)
    return [
        tuple(
            zeros((num_pages, a.slots(page_size), a.num_heads, a.head_dim), a.dtype) for a in pages
        )
        + tuple(zeros((num_slots, *a.shape), a.dtype) for a in slots)
        for pages, slots in zip(layers, states, strict=True)
    ]
