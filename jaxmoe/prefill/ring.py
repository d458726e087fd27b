"""The experts' ring of one device: its slots' arrays, and the jobs that fill them, layer by
layer.
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
from jaxmoe.prefill.plan import SlpPlan
from jaxmoe.weights.host_store import ExpertLayout, HostStore

_DEVICE_FORMATS = ("bf16", "f32", "fp8_block")  # that the GPU's kernels read


def slot_arrays(layout: ExpertLayout, group: int, device: Device) -> tuple[jax.Array, ...]:
    """Zeros for one slot, as `slot_ring.expert_buffers` says."""
    shapes = expert_buffers(group, layout.intermediate, layout.hidden, layout.format)
    with jax.default_device(device):
        return tuple(jax.device_put(jnp.zeros(shape, dtype), device) for shape, dtype in shapes)


class ExpertRing:
    """Streams the experts of `store` to `device`, every layer in turn.

    Raises: CheckpointError where the experts' format or sizes are not the same in all layers, or
    one that the device cannot read.
    """

    def __init__(self, driver: DeviceDriver, device: Device, store: HostStore, plan: SlpPlan):
        layout = store.layouts[0]
        if any(other != layout for other in store.layouts):
            raise CheckpointError(
                "experts of several sizes or formats cannot share a ring of slots"
            )
        if device.platform != "cpu" and layout.format not in _DEVICE_FORMATS:
            raise CheckpointError(
                f"experts in {layout.format} cannot be streamed to the device; supported: "
                + ", ".join(_DEVICE_FORMATS)
            )
        arrays = [slot_arrays(layout, plan.group_experts, device) for _ in range(plan.num_slots)]
        self._device = device
        self._plan = plan
        self._layers = len(store.layouts)
        self._groups = layout.num_experts // plan.group_experts
        self._ring = SlotRing(driver, arrays)
        self._store = store
        self._num_experts = layout.num_experts
        self._jobs = self._make_jobs(self._layers)

    def _make_jobs(self, num_layers: int) -> SlotJobs:
        jobs, plan = SlotJobs(), self._plan
        for layer in range(num_layers):
            for g, first in enumerate(range(0, self._num_experts, plan.group_experts)):
                jobs.add_experts(
                    self._store.native, g % plan.num_slots, layer, first, plan.group_experts
                )
        return jobs

    def measure_pass_s(self) -> float:
        """About how long all experts take over the bus: a layer or two are timed."""
        layers = min(2, self._layers)
        self.drain(layers)
        begin = time.perf_counter()
        self.drain(layers)
        return (time.perf_counter() - begin) * self._layers / layers

    @property
    def groups(self) -> Sequence[ExpertGroup]:
        """The slots as the kernels take them."""
        return [ExpertGroup(*slot) for slot in self._ring.slots]

    @property
    def total_bytes(self) -> int:
        """Bytes that one run streams."""
        return self._jobs.total_bytes

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

        def layer(x: jax.Array) -> jax.Array:
            for g in range(self._groups):
                slot = g % self._plan.num_slots
                (x,) = self.acquire(slot, x)
                (x,) = self.release(slot, x)
            return x

        program = jax.jit(layer, donate_argnums=0)
        x = jax.device_put(jnp.zeros(8), self._device)
        compiled = program.lower(x).compile()
        self._ring.start(self._make_jobs(num_layers or self._layers))
        try:
            for _ in range(num_layers or self._layers):
                x = compiled(x)
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
