"""What the tests of native operations share: random weights, stores filled with them, bounds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi import reference
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.host_store import NativeHostStore, native_host_store
from jaxmoe.ffi.ops import Weight
from jaxmoe.quant import formats

FORMATS = tuple(formats.FORMATS)
# Those whose shapes are free of groups; the others share all code but the kernels, which the C++
# tests take through every shape.
UNGROUPED = ("bf16", "f32", "fp8_block")
MATRICES = ("gate", "up", "down")


def random_weight(rng: np.random.Generator, weight_format: str, *shape: int) -> Weight:
    """`[..., N, K]` of a format, values around 1, with random scales."""
    *lead, n, k = shape
    word = cast(formats.WeightFormat, weight_format)
    info = formats.FORMATS[word]
    if info.bits == 4:
        data = rng.integers(0, 256, (*lead, *formats.data_shape(word, n, k)), np.uint8)
    else:
        values = rng.standard_normal(shape).astype(np.float32)
        data = values.astype(jnp.dtype(info.data_dtype))
    wanted = formats.scale_shape(word, n, k)
    if wanted is None:
        return Weight(jnp.array(data))
    if info.scale_dtype == "uint32":
        words = rng.uniform(0.1, 0.5, (*lead, *wanted)).astype(np.float16).astype(np.float32)
        scale = words.view(np.uint32) | rng.integers(0, 17, words.shape, np.uint32)
    elif info.tail_cols:
        codes = rng.integers(40, 72, (*lead, n, k // 16), np.uint8)  # 0.25 to 3.75
        factors = rng.uniform(0.1, 0.5, (*lead, n, 1)).astype(np.float32).view(np.uint8)
        scale = np.concatenate([codes, factors], axis=-1)
    elif info.scale_dtype == "uint8":
        scale = rng.integers(125, 129, (*lead, *wanted)).astype(np.uint8)
    else:
        scale = rng.uniform(0.5, 2.0, (*lead, *wanted)).astype(jnp.dtype(info.scale_dtype))
        if info.bits == 4:
            scale = scale / np.array(4, scale.dtype)  # nibbles reach to -8
    return Weight(jnp.array(data), jnp.array(scale))


def padded_columns(weight_format: str, k: int) -> int:
    """The least number of columns from `k` on that the format can have."""
    info = formats.FORMATS[cast(formats.WeightFormat, weight_format)]
    return -(-k // info.group_cols) * info.group_cols if info.whole_groups else k


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
        gate = self.weights["gate"]
        return (*gate.data.shape[:-1], gate.num_columns)


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
