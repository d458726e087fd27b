"""The ring of slots through which weights stream to a device while the model computes.

A slot is a list of long-lived device arrays. A run is a list of jobs, each of which fills one slot;
a loader thread works them off in order, as far ahead as slots are free. Compiled programs take the
slots' arrays as operands and guard their use with `acquire` (ON) and `release` (OFF), which pass
arrays through. See xla_ffi/prefill/slot_ring.h; the paper's section 3.1.

What must hold in a program:
  * an operation that reads a slot takes what `acquire` gave, or something computed from it, beside
    the slot's array: XLA orders by data alone, and nothing else keeps it from reading too early. A
    conversion, slice or sum of the slot alone may run before: leave it to the kernel that also
    takes the activations;
  * `release` takes every result that was computed from the slot. One that only a later result
    depends on is not enough: XLA may compute the two apart, each from the slot;
  * the slots' arrays are not donated, and no result aliases them;
  * per device, slots are acquired in the order of the jobs, and held no longer than the ring can
    spare them: with R slots, at most R - 1 at a time if the loader is to work meanwhile.

On the CPU platform `acquire` blocks a thread of XLA's pool until the loader is there.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import _native
from jaxmoe.ffi.device_driver import Device, DeviceDriver, bytes_of
from jaxmoe.ffi.host_store import NativeHostStore
from jaxmoe.ffi.registry import register_targets
from jaxmoe.quant.formats import FORMATS, WeightFormat, data_shape, scale_shape

_ANY_DEVICE = -1


class SlotJobs:
    """What a run copies, in order. May be used for any number of runs.

    Sources are page-locked before they are named here, or are copied as pageable memory.
    """

    def __init__(self) -> None:
        self._native = _native.SlotJobs()

    @property
    def native(self) -> _native.SlotJobs:
        return self._native

    def add_experts(
        self, store: NativeHostStore, slot: int, layer: int, first_expert: int, num_experts: int
    ) -> None:
        """A job that fills a slot with experts of a MoE layer; see `expert_buffers`.

        Raises: ValueError where the store has no such expert or it was not loaded.
        """
        self._native.add_experts(store, slot, layer, first_expert, num_experts)

    def add_arrays(
        self,
        slot: int,
        name: str,
        parts: Iterable[tuple[int, int, np.ndarray]],
        lock: _native.PageLock | None = None,
    ) -> None:
        """A job that copies whole arrays: (buffer of the slot, offset in bytes, array) each.

        name: of the job, for errors. lock: what `DeviceDriver.lock_arrays` gave for them.
        """
        copies = [(buffer, offset, bytes_of(array)) for buffer, offset, array in parts]
        self._native.add_arrays(slot, name, copies, lock)

    def __len__(self) -> int:
        return len(self._native)

    @property
    def total_bytes(self) -> int:
        return self._native.total_bytes

    @property
    def num_copies(self) -> int:
        return self._native.num_copies

    @property
    def unlocked_bytes(self) -> int:
        """Of `total_bytes`, those whose source is not page-locked."""
        return self._native.unlocked_bytes


def expert_buffers(
    num_experts: int, f: int, d: int, weight_format: WeightFormat
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of a slot's arrays that hold `num_experts` experts (X) of a layer.

    gate and up `[X, F, D]`, down `[X, D, F]`, as quant/formats.py has them; then, where the format
    has scales, those of gate, up and down.
    """
    info = FORMATS[weight_format]
    shapes = ((f, d), (f, d), (d, f))
    dtype = jnp.dtype(info.data_dtype)
    buffers = [((num_experts, *data_shape(weight_format, n, k)), dtype) for n, k in shapes]
    for n, k in shapes:
        scales = scale_shape(weight_format, n, k)
        if scales is not None:
            buffers.append(((num_experts, *scales), jnp.dtype(info.scale_dtype)))
    return buffers


class _Turn:
    """Of rings that share slots, the one with a run under way."""

    ring: SlotRing | None = None


class SlotRing:
    """R slots of one device and their loader.

    driver: of the device that the arrays are on.
    slots: of each slot its arrays, every one a buffer of its own, on one device.
    stall_s: how long a run may wait with nothing moving before it fails.
    beside: a ring that some of the slots belong to as well. One of the two runs at a time, and its
        programs have ended before the other starts: events of one say nothing to the other.

    Raises: ConfigError for fewer than two slots, or arrays that are not as above.
    """

    def __init__(
        self,
        driver: DeviceDriver,
        slots: Sequence[Sequence[jax.Array]],
        stall_s: float = 120.0,
        *,
        beside: SlotRing | None = None,
    ):
        register_targets()
        self._turn = _Turn() if beside is None else beside._turn
        devices = {d for slot in slots for array in slot for d in array.devices()}
        if len(devices) != 1:
            raise ConfigError(f"a slot ring's arrays are on {len(devices)} devices; wanted one")
        (self.device,) = devices
        if driver.is_host != (self.device.platform == "cpu"):
            raise ConfigError(f"the arrays are on {self.device}, the driver: {driver.describe()}")
        self.slots = tuple(tuple(slot) for slot in slots)
        jax.block_until_ready(self.slots)
        addresses = [[(a.unsafe_buffer_pointer(), a.nbytes) for a in slot] for slot in self.slots]
        try:
            self._native = _native.SlotRing(driver.native, addresses, stall_s)
            self._group = _native.SlotRingGroup([(_ANY_DEVICE, self._native)])
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def native(self) -> _native.SlotRing:
        return self._native

    @property
    def id(self) -> int:
        return self._group.id

    def start(self, jobs: SlotJobs, *, allow_unlocked: bool = False) -> None:
        """Begins a run. The programs that used an earlier one that failed must have ended.

        allow_unlocked: copy from memory that is not page-locked, several times slower on a GPU.

        Raises: ValueError for jobs that do not fit the ring, or while a run is under way, of this
        ring or of one that shares its slots.
        """
        if self._turn.ring not in (None, self):
            raise ValueError("another ring of the same slots has a run under way")
        self._native.start(jobs.native, allow_unlocked)
        self._turn.ring = self

    def finish(self) -> None:
        """Waits until every job was loaded, acquired and released.

        Raises: RuntimeError with the cause where the run failed; the next may be started then.
        """
        try:
            self._native.finish()
        finally:
            self._ended()

    def abort(self, cause: str) -> None:
        """Ends the run now: programs that acquire or release fail, with this cause."""
        self._native.abort(cause)
        self._ended()

    def _ended(self) -> None:
        if self._turn.ring is self:
            self._turn.ring = None

    def set_pace(self, bytes_per_s: float) -> None:
        """Copies take no more than this from now on, also in later runs; 0: as fast as they go. At
        any time, from any thread.
        """
        self._native.set_pace(bytes_per_s)

    def stats(self) -> dict[str, float]:
        """Of this run or the last: `jobs`, `copies` and `bytes` done; `copy_s`, the time in which
        bytes moved; `loader_wait_s` and `acquire_wait_s`, host threads' time spent waiting;
        `paced_bytes`, which a pace held back, and `paced_s`, what they take at it."""
        return self._native.stats()

    def close(self) -> None:
        """Aborts what runs and ends the loader. The arrays are the caller's. Idempotent."""
        self._group.close()
        self._native.close()
        self._ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()


class SlotRingGroup:
    """One ring a device, under one name: for a program that runs on all of them (`shard_map`)."""

    def __init__(self, rings: Mapping[Device, SlotRing]):
        members = []
        for device, ring in rings.items():
            if ring.device != device or device.local_hardware_id is None:
                raise ConfigError(f"the slot ring given for {device} is of {ring.device}")
            members.append((device.local_hardware_id, ring.native))
        self._group = _native.SlotRingGroup(members)

    @property
    def id(self) -> int:
        return self._group.id

    def close(self) -> None:
        """Takes the name away; the rings stay. Idempotent."""
        self._group.close()


def acquire(ring: SlotRing | SlotRingGroup, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, once the slot's next job is in place: the kth acquire of a run, the kth job."""
    return _call("jaxmoe_slot_acquire", ring, slot, arrays)


def release(ring: SlotRing | SlotRingGroup, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays; once they are there, the slot may be filled again."""
    return _call("jaxmoe_slot_release", ring, slot, arrays)


def _call(
    target: str, ring: SlotRing | SlotRingGroup, slot: int, arrays: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    if not arrays:
        raise ValueError(f"{target} without arrays to pass through would run at any time")
    # A release whose result nobody wants must happen all the same.
    call = jax.ffi.ffi_call(
        target,
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays),
        input_output_aliases={i: i for i in range(len(arrays))},
        has_side_effect=True,
    )
    return tuple(call(*arrays, ring_id=np.int64(ring.id), slot=np.int64(slot)))
