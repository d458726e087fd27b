"""The ring of one device: its slots' arrays, and the jobs that fill them, layer by layer.

Slots of experts first, then, where the other weights are streamed too, those of layer_weights.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmoe.common.errors import CheckpointError
from jaxmoe.ffi import slot_ring
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.ffi.slot_ring import SlotJobs, SlotRing, expert_buffers
from jaxmoe.kernels.experts import ExpertGroup
from jaxmoe.prefill.layer_weights import LayerParts, WeightSlots
from jaxmoe.prefill.plan import SlpPlan
from jaxmoe.weights.host_store import ExpertLayout, HostStore

# That the GPU's kernels read.
DEVICE_FORMATS = (
    "bf16",
    "f32",
    "fp8_block",
    "fp8_channel",
    "int4_g32",
    "int4_g128",
    "mxfp4",
    "mxfp8",
)


def slot_arrays(layout: ExpertLayout, group: int, device: Device) -> tuple[jax.Array, ...]:
    """Zeros for one slot, as `slot_ring.expert_buffers` says."""
    shapes = expert_buffers(group, layout.intermediate, layout.hidden, layout.format)
    with jax.default_device(device):
        return tuple(jax.device_put(jnp.zeros(shape, dtype), device) for shape, dtype in shapes)


class ExpertRing:
    """Streams the experts of `store` to `device`, every layer in turn.

    layers: all layers with their leaves on the CPU, where the plan streams these as well. weights:
    their slots; None otherwise.

    Raises: CheckpointError where the experts' format or sizes are not the same in all layers, or
    one that the device cannot read.
    """

    def __init__(
        self,
        driver: DeviceDriver,
        device: Device,
        store: HostStore,
        plan: SlpPlan,
        layers: Sequence[LayerParts] = (),
    ):
        layout = store.layouts[0]
        if any(other != layout for other in store.layouts):
            raise CheckpointError(
                "experts of several sizes or formats cannot share a ring of slots"
            )
        if device.platform != "cpu" and layout.format not in DEVICE_FORMATS:
            raise CheckpointError(
                f"experts in {layout.format} cannot be streamed to the device; supported: "
                + ", ".join(DEVICE_FORMATS)
            )
        arrays = [slot_arrays(layout, plan.group_experts, device) for _ in range(plan.num_slots)]
        self.weights: WeightSlots | None = None
        self._order = [True] * len(store.layouts)  # of each layer, whether it has experts
        if plan.weight_slots:
            leaves = [layer.leaves for layer in layers]
            self.weights = WeightSlots(leaves, device, driver, plan.weight_slots, plan.num_slots)
            self._order = [layer.is_moe for layer in layers]
            arrays += self.weights.arrays
        self._device = device
        self._plan = plan
        self._groups = layout.num_experts // plan.group_experts
        self._ring = SlotRing(driver, arrays)
        self._store = store
        self._num_experts = layout.num_experts
        self._jobs = self._make_jobs(len(self._order))
        self._total_bytes = self._jobs.total_bytes

    def _make_jobs(self, num_layers: int) -> SlotJobs:
        """Of the first layers: each one's other weights, then its experts."""
        jobs, plan, moe_layer = SlotJobs(), self._plan, 0
        for layer, is_moe in enumerate(self._order[:num_layers]):
            if self.weights is not None:
                self.weights.add_job(jobs, layer)
            if not is_moe:
                continue
            for g, first in enumerate(range(0, self._num_experts, plan.group_experts)):
                jobs.add_experts(
                    self._store.native, g % plan.num_slots, moe_layer, first, plan.group_experts
                )
            moe_layer += 1
        return jobs

    def measure_pass_s(self) -> float:
        """About how long all weights take over the bus: a layer or two with experts are timed."""
        with_experts = [i for i, is_moe in enumerate(self._order) if is_moe]
        layers = with_experts[:2][-1] + 1
        self.drain(layers)
        begin = time.perf_counter()
        self.drain(layers)
        seconds = time.perf_counter() - begin
        return seconds * self.total_bytes / self._make_jobs(layers).total_bytes

    @property
    def groups(self) -> Sequence[ExpertGroup]:
        """The experts' slots as the kernels take them."""
        return [ExpertGroup(*slot) for slot in self._ring.slots[: self._plan.num_slots]]

    @property
    def ring(self) -> SlotRing:
        """The slots of experts come first. To share them with another ring: while this one has no
        run under way.
        """
        return self._ring

    @property
    def total_bytes(self) -> int:
        """Bytes that one run streams, experts and other weights."""
        return self._total_bytes

    def start(self, *, allow_unlocked: bool = False) -> None:
        """Begins to load the first layers."""
        self._ring.start(self._jobs, allow_unlocked=allow_unlocked)

    def acquire(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return slot_ring.acquire(self._ring, slot, *arrays)

    def release(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return slot_ring.release(self._ring, slot, *arrays)

    def finish(self) -> None:
        self._ring.finish()

    def abort(self, cause: str) -> None:
        self._ring.abort(cause)

    def drain(self, num_layers: int | None = None) -> None:
        """A whole run, or the first layers of one, with nothing computed."""
        order = self._order[: num_layers or len(self._order)]

        def layer(x: jax.Array, weight_slot: int | None, is_moe: bool) -> jax.Array:
            slots = [] if weight_slot is None else [weight_slot]
            if is_moe:
                slots += [g % self._plan.num_slots for g in range(self._groups)]
            for slot in slots:
                (x,) = self.acquire(slot, x)
                (x,) = self.release(slot, x)
            return x

        program = jax.jit(layer, static_argnums=(1, 2), donate_argnums=0)
        x = jax.device_put(jnp.zeros(8), self._device)
        kinds = [
            (None if self.weights is None else self.weights.slots[i], is_moe)
            for i, is_moe in enumerate(order)
        ]
        compiled = {kind: program.lower(x, *kind).compile() for kind in dict.fromkeys(kinds)}
        self._ring.start(self._make_jobs(len(order)))
        try:
            for kind in kinds:
                x = compiled[kind](x)
            jax.block_until_ready(x)
            self.finish()
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}")
            raise

    def set_pace(self, bytes_per_s: float) -> None:
        """Limits the loader from now on, also in runs to come; 0: no limit."""
        self._ring.set_pace(bytes_per_s)

    def stats(self) -> dict[str, float]:
        return self._ring.stats()

    def close(self) -> None:
        self._ring.close()
        self._jobs = SlotJobs()  # they hold the page-locking
        if self.weights is not None:
            self.weights.close()
