"""The experts' rings of R devices, each of which streams its own share of every layer's experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.common.errors import CheckpointError
from jaxmoe.ffi import slot_ring
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.ffi.slot_ring import SlotJobs, SlotRing, SlotRingGroup
from jaxmoe.kernels.experts import ExpertGroup
from jaxmoe.moe.small_ep import expert_share, most_experts
from jaxmoe.prefill.plan import SlpPlan
from jaxmoe.prefill.ring import DEVICE_FORMATS, slot_arrays
from jaxmoe.weights.host_store import HostStore


class RankRings:
    """Rank r streams `small_ep.expert_share` of every layer to device r of `mesh`.

    drivers: one a device. plan: of one rank's experts, the same ring on all. To programs the ranks'
    slots are one array each, sharded by `mesh`'s axis. first: a ring of the first device whose
    first slots are its slots here too, in turn; default: all have slots of their own.

    Raises: CheckpointError where the experts' format or sizes are not the same in all layers, or
    ones that the devices cannot read.
    """

    def __init__(
        self,
        mesh: Mesh,
        drivers: Mapping[Device, DeviceDriver],
        store: HostStore,
        plan: SlpPlan,
        *,
        stall_s: float = 120.0,
        first: SlotRing | None = None,
    ) -> None:
        layout = store.layouts[0]
        if any(other != layout for other in store.layouts):
            raise CheckpointError(
                "experts of several sizes or formats cannot share a ring of slots"
            )
        devices = list(mesh.devices.flat)
        if devices[0].platform != "cpu" and layout.format not in DEVICE_FORMATS:
            raise CheckpointError(
                f"experts in {layout.format} cannot be streamed to the devices; supported: "
                + ", ".join(DEVICE_FORMATS)
            )
        self._num_experts, self._store, self._plan = layout.num_experts, store, plan
        self._groups = most_experts(layout.num_experts, len(devices)) // plan.group_experts
        self.rings: list[SlotRing] = []
        self._group = None
        try:
            for device in devices:
                beside = first if device == devices[0] else None
                if beside is None:
                    group = plan.group_experts
                    slots = [slot_arrays(layout, group, device) for _ in range(plan.num_slots)]
                else:
                    slots = beside.slots[: plan.num_slots]
                self.rings.append(SlotRing(drivers[device], slots, stall_s, beside=beside))
            self._group = SlotRingGroup(dict(zip(devices, self.rings, strict=True)))
        except BaseException:
            self.close()
            raise
        self._jobs = [self._make_jobs(rank, len(store.layouts)) for rank in range(len(devices))]
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
        self.groups: Sequence[ExpertGroup] = [
            ExpertGroup(*(_one_array(parts, sharding) for parts in zip(*slots, strict=True)))
            for slots in zip(*(ring.slots for ring in self.rings), strict=True)
        ]

    def _make_jobs(self, rank: int, num_layers: int) -> SlotJobs:
        first, count = expert_share(self._num_experts, len(self.rings), rank)
        jobs, plan = SlotJobs(), self._plan
        for layer in range(num_layers):
            for g in range(self._groups):
                slot, begin = g % plan.num_slots, g * plan.group_experts
                here = min(plan.group_experts, count - begin)
                if here > 0:
                    jobs.add_experts(self._store.native, slot, layer, first + begin, here)
                else:  # the rank with one expert less: programs are the same on all
                    jobs.add_arrays(slot, f"MoE layer {layer}, no experts", [])
        return jobs

    @property
    def streamed_bytes(self) -> list[int]:
        """Of one run, by rank."""
        return [jobs.total_bytes for jobs in self._jobs]

    @property
    def total_bytes(self) -> int:
        """Of one run, on all devices together."""
        return sum(self.streamed_bytes)

    def set_pace(self, bytes_per_s: float) -> None:
        """Of all devices together, each its share; 0: as fast as they go."""
        for ring in self.rings:
            ring.set_pace(bytes_per_s / len(self.rings))

    def start(self) -> None:
        """Begins to load the first layers, on all devices or none."""
        try:
            for ring, jobs in zip(self.rings, self._jobs, strict=True):
                ring.start(jobs)
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}")
            raise

    def finish(self) -> None:
        """Waits until all is loaded and used. Raises: RuntimeError where a run failed."""
        for ring in self.rings:
            ring.finish()

    def abort(self, cause: str) -> None:
        """Ends the run on all devices: programs that acquire or release fail."""
        for ring in self.rings:
            ring.abort(cause)

    def acquire(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        assert self._group is not None
        return slot_ring.acquire(self._group, slot, *arrays)

    def release(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        assert self._group is not None
        return slot_ring.release(self._group, slot, *arrays)

    def stats(self) -> list[dict[str, float]]:
        """By rank, see `SlotRing.stats`."""
        return [ring.stats() for ring in self.rings]

    def measure_pass_s(self) -> float:
        """About how long all experts take over the buses at once: a layer or two are timed."""
        layers = min(2, len(self._store.layouts))
        drains = [self._drain(rank, layers) for rank in range(len(self.rings))]

        def all_ranks() -> None:
            with ThreadPoolExecutor(len(drains)) as pool:
                for done in [pool.submit(drain) for drain in drains]:
                    done.result()

        all_ranks()
        begin = time.perf_counter()
        all_ranks()
        return (time.perf_counter() - begin) * len(self._store.layouts) / layers

    def _drain(self, rank: int, layers: int) -> Callable[[], None]:
        """A run of some layers with nothing computed."""
        ring, jobs = self.rings[rank], self._make_jobs(rank, layers)

        def layer(x: jax.Array) -> jax.Array:
            for g in range(self._groups):
                (x,) = slot_ring.acquire(ring, g % self._plan.num_slots, x)
                (x,) = slot_ring.release(ring, g % self._plan.num_slots, x)
            return x

        x = jax.device_put(jnp.zeros(8), ring.device)
        compiled = jax.jit(layer).lower(x).compile()

        def drain() -> None:
            ring.start(jobs)
            try:
                y = x
                for _ in range(layers):
                    y = compiled(y)
                jax.block_until_ready(y)
                ring.finish()
            except BaseException as error:
                ring.abort(f"{type(error).__name__}: {error}")
                raise

        return drain

    def close(self) -> None:
        """Aborts what runs and ends the loaders. Idempotent."""
        if self._group is not None:
            self._group.close()
        for ring in self.rings:
            ring.close()
        self.groups = []


def _one_array(parts: Sequence[jax.Array], sharding: NamedSharding) -> jax.Array:
    """The ranks' arrays of one slot, which stay where they are."""
    shape = len(parts) * parts[0].shape[0], *parts[0].shape[1:]
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))


def rank_mesh(devices: Sequence[Device]) -> Mesh:
    """The devices in order, rank 0 first."""
    return Mesh(np.array(devices), ("rank",))
