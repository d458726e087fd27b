"""Host buffers that XLA takes as they are.

XLA:CPU uses a numpy array without copying it only if it starts at a multiple of 64 bytes, which
numpy's own allocations rarely do.
"""

from __future__ import annotations

import math

import jax
import numpy as np

ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that starts at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    if not array.nbytes:
        return array.flags.c_contiguous
    return array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0


def to_jax(array: np.ndarray) -> jax.Array:
    """The same memory as a jax array of the CPU device; `array` must not be written to after."""
    assert is_aligned(array), (array.ctypes.data, array.flags)
    result = jax.device_put(array, jax.local_devices(backend="cpu")[0])
    if array.nbytes:
        assert result.unsafe_buffer_pointer() == array.ctypes.data, "XLA copied a weight"
    return result
