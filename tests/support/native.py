"""What the tests of native operations share: random weights, stores filled with them, bounds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.ffi import reference
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.host_store import NativeHostStore, native_host_store
from jaxmoe.ffi.ops import Weight

FORMATS = ("bf16", "f32", "fp8_block")
MATRICES = ("gate", "up", "down")


def random_weight(rng: np.random.Generator, weight_format: str, *shape: int) -> Weight:
    """`[..., N, K]` of a format; FP8 has random block scales."""
    values = rng.standard_normal(shape).astype(np.float32)
    if weight_format == "f32":
        return Weight(jnp.array(values))
    if weight_format == "bf16":
        return Weight(jnp.array(values, jnp.bfloat16))
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = rng.uniform(0.5, 2.0, blocks).astype(np.float32)
    return Weight(jnp.array(values.astype(ml_dtypes.float8_e4m3fn)), jnp.array(scale))


@dataclasses.dataclass
class Layer:
    """One MoE layer's experts: `gate`, `up` `[E, F, D]`, `down` `[E, D, F]`."""

    weight_format: str
    weights: dict[str, Weight]

    @classmethod
    def random(cls, rng, weight_format: str, num_experts: int, f: int, d: int) -> Layer:
        shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        return cls(
            weight_format,
            {m: random_weight(rng, weight_format, num_experts, *s) for m, s in shapes.items()},
        )

    @property
    def dims(self) -> tuple[int, int, int]:
        return tuple(self.weights["gate"].data.shape)


@contextlib.contextmanager
def make_store(runtime: CpuRuntime, *layers: Layer) -> Iterator[NativeHostStore]:
    """A store with arena backing that holds the layers, closed afterwards."""
    store = native_host_store(runtime, [(*x.dims, x.weight_format) for x in layers], "arena")
    for index, layer in enumerate(layers):
        for which, matrix in enumerate(MATRICES):
            weight = layer.weights[matrix]
            data = np.asarray(weight.data)
            for e in range(data.shape[0]):
                rows = np.ascontiguousarray(data[e]).view(np.uint8)
                for begin, end, view in store.segments(index, e, which):
                    view[:] = rows[begin:end]
                store.mark_loaded(index, e, which)
                if weight.scale_inv is not None:
                    store.set_scale(index, e, which, np.asarray(weight.scale_inv[e]))
    try:
        yield store
    finally:
        store.close()


def absolute_linear(x, w: Weight) -> np.ndarray:
    """sum |x| |w| in float64: what the error bounds of y = x Wᵀ are multiples of."""
    dense = np.abs(np.asarray(reference.dequantize(w), np.float64))
    x = np.abs(np.asarray(x.astype(jnp.float32), np.float64))
    if dense.ndim == 3:
        return np.einsum("tgk,gnk->tgn", x, dense)
    return x @ dense.T


# FP32 accumulation against float64: a chain of additions rounds each time; 8 covers the chains'
# lengths here. BF16 activations in the matrix family are exact operands; hidden activations are
# not.
def linear_bound(x, w: Weight, out_dtype=jnp.float32) -> np.ndarray:
    eps = 8 * 2.0**-23 + (2.0**-8 if out_dtype == jnp.bfloat16 else 0.0)
    return eps * absolute_linear(x, w) + 1e-30


def bits(array) -> np.ndarray:
    """An array as unsigned integers, for bitwise comparison (NaN included)."""
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
