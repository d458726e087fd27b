"""What a layer has beside its routed experts: taken apart for programs of one layer, and streamed
through a few slots where the device has no room for all layers.

Layers whose weights have the same shapes share slots, in turn. The copies go through the experts'
ring (ring.py), in the order in which the model wants them; the source is the only copy there is, in
host memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.ffi.slot_ring import SlotJobs
from jaxmoe.models.decoder import Decoder
from jaxmoe.moe.moe_block import MoeBlock
from jaxmoe.prefill.plan import OtherWeights


class LayerParts(NamedTuple):
    """A layer as programs take it. The graphdef knows no layer's number."""

    graphdef: Any
    treedef: Any
    leaves: list[jax.Array]
    is_moe: bool


def split_layers(model: Decoder) -> list[LayerParts]:
    """The model's layers; MoE layers forget which they are."""
    parts = []
    for layer in model.layers:
        if is_moe := isinstance(layer.mlp, MoeBlock):
            layer.mlp.moe_layer_idx = 0  # the only difference between MoE layers
        graphdef, state = nnx.split(layer)
        leaves, treedef = jax.tree.flatten(state)
        parts.append(LayerParts(graphdef, treedef, leaves, is_moe))
    return parts


def other_weights(layers: Sequence[Sequence[Any]], all_bytes: int) -> OtherWeights:
    """For the planner: layers, the leaves of each (arrays or their shapes); all_bytes, of these and
    of what lies before and after the layers.
    """
    shapes = {_shapes(leaves): _bytes(leaves) for leaves in layers}
    return OtherWeights(all_bytes, tuple(shapes.values()))


class WeightSlots:
    """Slots on the device for the weights of all layers in host memory.

    layers: every layer's leaves, on the CPU. per_shape: slots for layers of one shape.
    first_slot: of these in the ring they are part of.

    arrays: of each slot. slots: of each layer the one it passes through.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[jax.Array]],
        device: Device,
        driver: DeviceDriver,
        per_shape: int,
        first_slot: int,
    ) -> None:
        self._host = [[np.asarray(leaf) for leaf in leaves] for leaves in layers]
        self._first = first_slot
        begin: dict[Any, int] = {}
        met: dict[Any, int] = {}
        self.arrays: list[tuple[jax.Array, ...]] = []
        self.slots: list[int] = []
        for leaves in layers:
            shape = _shapes(leaves)
            if shape not in begin:
                begin[shape] = len(self.arrays)
                self.arrays += [_zeros(leaves, device) for _ in range(per_shape)]
            turn = met.get(shape, 0)
            met[shape] = turn + 1
            self.slots.append(first_slot + begin[shape] + turn % per_shape)
        self._lock = driver.lock_arrays(
            {
                f"the other weights, part {i}": pages
                for i, pages in enumerate(_whole_pages(a for leaves in self._host for a in leaves))
            }
        )

    def of(self, layer: int) -> tuple[jax.Array, ...]:
        """The arrays that hold the layer's leaves between its slot's acquire and release."""
        return self.arrays[self.slots[layer] - self._first]

    def add_job(self, jobs: SlotJobs, layer: int) -> None:
        parts = [(i, 0, array) for i, array in enumerate(self._host[layer])]
        jobs.add_arrays(self.slots[layer], f"other weights of layer {layer}", parts, self._lock)

    def close(self) -> None:
        """The page-locking ends with the last jobs."""
        self._lock.close()
        self.arrays, self._host = [], []


def _shapes(leaves: Sequence[Any]) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves)


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _zeros(leaves: Sequence[jax.Array], device: Device) -> tuple[jax.Array, ...]:
    with jax.default_device(device):
        return tuple(jax.device_put(jnp.zeros(a.shape, a.dtype), device) for a in leaves)


def _whole_pages(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The pages that the arrays lie in, each once: a page cannot be locked for two of them."""
    ranges: list[list[int]] = []
    for array in sorted(arrays, key=lambda a: a.ctypes.data):
        begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(array.ctypes.data + array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if ranges and begin <= ranges[-1][1]:
            ranges[-1][1] = max(ranges[-1][1], end)
        else:
            ranges.append([begin, end])
    return [
        np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))
        for begin, end in ranges
    ]
