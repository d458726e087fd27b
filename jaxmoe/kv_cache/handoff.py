"""Pages of one sequence from one page array to another, a layer at a time: from the device that
computed a prompt to the one that decodes it (design: KV hand-over), and back for a known beginning.

A block is what the pages hold, in their order, as arrays of its own: it may be copied to another
device, or wait, while the caches it came from and goes to are used by other programs. Which pages
are a sequence's is the caller's to know; nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.device_driver import Device

Cache = tuple[jax.Array, ...]  # the page arrays of a layer, `[P, Z, K, H]` each
Block = tuple[jax.Array, ...]  # `[n, Z, K, H]` each, n at least as many as the pages


def padded_pages(num_pages: int) -> int:
    """Pages of a block: few sizes, so that few programs are ever compiled."""
    return 1 << max(num_pages - 1, 0).bit_length()


def _take(cache: Cache, pages: jax.Array) -> Block:
    return tuple(jnp.take(a, pages, axis=0, mode="clip") for a in cache)


def _put(cache: Cache, pages: jax.Array, block: Block) -> Cache:
    # Padding names a page behind the last one, and is dropped.
    return tuple(a.at[pages].set(b, mode="drop") for a, b in zip(cache, block, strict=True))


_take_pages = jax.jit(_take)
_put_pages = jax.jit(_put, donate_argnums=0)


def take(cache: Cache, pages: Sequence[int]) -> Block:
    """What the pages of a layer hold now, on the same device."""
    ids = np.zeros(padded_pages(len(pages)), np.int32)
    ids[: len(pages)] = pages
    return _take_pages(cache, ids)


def put(cache: Cache, pages: Sequence[int], block: Block) -> Cache:
    """The layer's arrays, which are donated, with the block in the pages; both on one device."""
    ids = np.full(padded_pages(len(pages)), cache[0].shape[0], np.int32)
    assert len(ids) == block[0].shape[0], (len(pages), block[0].shape)
    ids[: len(pages)] = pages
    return _put_pages(cache, ids, block)


def send(block: Block, device: Device) -> Block:
    """The block on another device; the copy is under way when this returns."""
    return jax.device_put(block, device)
