"""Everything DSLP needs on the devices of a host, put together: weights, rings, programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.attention.zigzag import ArrayParts, Parts
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import Ops
from jaxmoe.ffi.slot_ring import SlotRing
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.experts import DeviceGroups
from jaxmoe.kernels.partial_attention import DeviceParts
from jaxmoe.kv_cache import store
from jaxmoe.models.decoder import cache_spec
from jaxmoe.moe.experts_streamed import GroupExperts, NativeGroups
from jaxmoe.moe.small_ep import AllToAll, Exchange, SmallEp
from jaxmoe.prefill.device import Resident, prompt_shape
from jaxmoe.prefill.dslp import DslpPrefill
from jaxmoe.prefill.dslp_plan import DslpPlan, plan_dslp
from jaxmoe.prefill.rank_rings import RankRings, rank_mesh
from jaxmoe.weights.loaded_model import LoadedModel

_EXCHANGES = {"small_ep": SmallEp, "all_to_all": AllToAll}


def replicate(state: Any, mesh: Mesh) -> Any:
    """Arrays of one device on all of `mesh`; what is on its device already is not copied."""
    whole = NamedSharding(mesh, PartitionSpec())

    def one(array: jax.Array) -> jax.Array:
        copies = [jax.device_put(array, device) for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(array.shape, whole, copies)

    return jax.tree.map(one, state)


def plan_for(
    config: ModelConfig,
    loaded: LoadedModel,
    num_ranks: int,
    *,
    free_bytes: int,
    max_prompt_tokens: int,
    max_context: int,
    compute_dtype: jax.typing.DTypeLike,
    chunk_tokens: int | None = None,
) -> DslpPlan:
    """Raises: CapacityError."""
    assert loaded.host_store is not None
    layout = loaded.host_store.layouts[0]
    itemsize = jax.numpy.dtype(compute_dtype).itemsize
    return plan_dslp(
        prompt_shape(config, layout.total_bytes // layout.num_experts, itemsize),
        num_ranks,
        free_bytes,
        max_prompt_tokens,
        kv_bytes=store.token_bytes(cache_spec(config, compute_dtype)[:1], 1),
        max_context=max_context,
        chunk_tokens=chunk_tokens,
    )


def make_dslp(
    loaded: LoadedModel,
    config: ModelConfig,
    devices: Sequence[Device],
    drivers: Mapping[Device, DeviceDriver],
    runtime: CpuRuntime,
    plan: DslpPlan,
    *,
    page_size: int,
    exchange: str = "small_ep",
    groups: GroupExperts | None = None,
    ops: tuple[Ops, Parts] | None = None,
    first: SlotRing | None = None,
) -> tuple[DslpPrefill, RankRings]:
    """The rings and the programs; the weights that are on `devices[0]`, where decode is, are copied
    to the others.

    exchange: "small_ep" or "all_to_all". groups, ops: default: the platform's. first: a ring of
    `devices[0]` whose slots are used here too (rank_rings.py).

    Raises: CheckpointError.
    """
    assert loaded.host_store is not None
    mesh = rank_mesh(devices)
    on_cpu = devices[0].platform == "cpu"
    if ops is None and on_cpu:
        ops = NativeOps(runtime, None, "matrix"), ArrayParts()
    elif ops is None:
        device_ops = DeviceOps(None, "prefill", one_sequence=True)
        ops = device_ops, DeviceParts(device_ops)
    if groups is None:
        groups = NativeGroups(runtime) if on_cpu else DeviceGroups(plan.rank.window_rows)
    rings = RankRings(mesh, drivers, loaded.host_store, plan.rank, first=first)
    try:
        how: Exchange = _EXCHANGES[exchange](
            mesh.axis_names[0], len(devices), config.moe.router.num_experts
        )
        dslp = DslpPrefill(
            loaded.graphdef,
            replicate(loaded.state, mesh),
            mesh,
            devices[0],
            ops[0],
            ops[1],
            rings,
            plan,
            exchange=how,
            groups=groups,
            page_size=page_size,
        )
    except BaseException:
        rings.close()
        raise
    return dslp, rings


class DslpDevices:
    """A model's prefill on several devices with a cache of its own, for benchmarks and tests."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: ModelConfig,
        devices: Sequence[Device],
        drivers: Mapping[Device, DeviceDriver],
        runtime: CpuRuntime,
        *,
        max_prompt_tokens: int,
        free_bytes: int,
        page_size: int = 16,
        chunk_tokens: int | None = None,
        compute_dtype: str = "bfloat16",
        exchange: str = "small_ep",
        ring: tuple[int, int] | None = None,
        groups: GroupExperts | None = None,
        ops: tuple[Ops, Parts] | None = None,
    ) -> None:
        """ring: (experts of a group, slots) instead of the planner's."""
        state = jax.device_put(loaded.state, devices[0])
        loaded = dataclasses.replace(loaded, state=state)
        pages = -(-max_prompt_tokens // page_size)
        plan = plan_for(
            config,
            loaded,
            len(devices),
            free_bytes=free_bytes,
            max_prompt_tokens=max_prompt_tokens,
            max_context=max_prompt_tokens,
            compute_dtype=compute_dtype,
            chunk_tokens=chunk_tokens,
        )
        if ring is not None:
            rank = dataclasses.replace(plan.rank, group_experts=ring[0], num_slots=ring[1])
            plan = dataclasses.replace(plan, rank=rank)
        self.plan, self.page_size, self._devices = plan, page_size, list(devices)
        spec = cache_spec(config, compute_dtype)
        self.caches = store.allocate(spec, pages, page_size, device=devices[0])
        self.dslp, self.rings = make_dslp(
            loaded,
            config,
            devices,
            drivers,
            runtime,
            plan,
            page_size=page_size,
            exchange=exchange,
            groups=groups,
            ops=ops,
        )

        self._resident = self.dslp.on_rings(Resident(self.rings.groups))

    def prefill(self, row: StepRow, *, streamed: bool = True) -> jax.Array:
        """The residual stream of the row's last token, on the first device. Not streamed: with
        whatever weights lie in the rings, to measure computing alone."""
        dslp = self.dslp if streamed else self._resident
        return dslp.prefill(row, lambda: self.caches)

    def copy_alone(self) -> float:
        """Bytes per second of one run's copies to all devices with nothing computed."""
        return self.streamed_bytes / self.rings.measure_pass_s()

    @property
    def streamed_bytes(self) -> int:
        """Of one run, to all devices together."""
        return self.rings.total_bytes

    def stats(self) -> dict[str, float]:
        """As `SlotRing.stats`: bytes of all devices, times of the one that took longest."""
        ranks = self.rings.stats()
        most = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        return most | {"bytes": sum(rank["bytes"] for rank in ranks)}

    def peak_bytes(self) -> int:
        """Of the device that used most."""
        return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in self._devices)

    def layers(self, row: StepRow) -> Generator[int, None, jax.Array]:
        """The same, a layer at each `next`."""
        return self.dslp.layers(row, lambda: self.caches)

    def close(self) -> None:
        """Ends the loaders; the weights stay the caller's."""
        self.dslp.close()
