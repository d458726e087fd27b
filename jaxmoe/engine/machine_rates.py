"""What this machine moves and computes a second: measured once, kept on disk with what it holds
for, read by the cost model of prompts (scheduler/prefill_route.py).

What it does not do: measure (machine_bench.py), or say what a figure is good for.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from jaxmoe.common.machine import cpu_id, cpu_name, memory_topology
from jaxmoe.engine import kept
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device
from jaxmoe.quant.formats import WeightFormat

FILE_NAME = "machine.json"
# Of the threads' time, what they must have run while kernels were measured for it to be kept.
LEAST_SHARE = 0.9
_VERSION = 1  # of what is measured; another one is measured anew


@dataclasses.dataclass(frozen=True)
class MachineRates:
    """Bytes and floating-point operations per second.

    read_bytes: DRAM, each NUMA node by its own threads. read_all_bytes: all nodes at once.
    copy_bytes: page-locked host memory to each device, one at a time. copy_joint_bytes: to each
        while all are copied to.
    gemm_flops, gemv_bytes: of the CPU kernels by weight format, at many activation rows and at one.
    device_flops: of a GPU's products at many rows, by weight format; empty without one.
    measured_unix_s: when.
    """

    read_bytes: tuple[float, ...]
    read_all_bytes: float
    copy_bytes: tuple[float, ...]
    copy_joint_bytes: tuple[float, ...]
    gemm_flops: Mapping[str, float]
    gemv_bytes: Mapping[str, float]
    device_flops: Mapping[str, float]
    measured_unix_s: float

    def copy_rate(self, num_devices: int = 1) -> float:
        """To the slowest of so many devices that are copied to together."""
        return min(self.copy_bytes[:1] if num_devices == 1 else self.copy_joint_bytes)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Self | None:
        """None where it is nothing that `as_json` would have written."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(content, dict) or sorted(content) != sorted(names):
            return None
        for name in ("read_bytes", "copy_bytes", "copy_joint_bytes"):
            if not isinstance(content[name], list) or not content[name]:
                return None
        for name in ("gemm_flops", "gemv_bytes", "device_flops"):
            if not isinstance(content[name], dict):
                return None
        for value in content.values():
            numbers = value.values() if isinstance(value, dict) else value
            for number in numbers if isinstance(value, list | dict) else [value]:
                if isinstance(number, bool) or not isinstance(number, int | float):
                    return None
                if not 0 < number < math.inf:
                    return None
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content.items()
        }
        return cls(**values)

    def merged(self, other: Self) -> Self:
        """`other`, and the formats that only this one has."""
        return dataclasses.replace(
            other,
            gemm_flops={**self.gemm_flops, **other.gemm_flops},
            gemv_bytes={**self.gemv_bytes, **other.gemv_bytes},
            device_flops={**self.device_flops, **other.device_flops},
        )


# Rates for formats, and the share of the CPUs' time that the kernels had while it measured.
Measure = Callable[[Sequence[WeightFormat]], tuple[MachineRates, float]]


@dataclasses.dataclass(frozen=True)
class KnownRates:
    """Rates and where they come from. key: what they hold for. source: for people."""

    rates: MachineRates
    key: str
    source: str

    def describe(self) -> str:
        """One line for the start-up report."""
        r = self.rates
        nodes = " + ".join(f"{rate / 1e9:.1f}" for rate in r.read_bytes)
        copies = " + ".join(f"{rate / 1e9:.1f}" for rate in r.copy_joint_bytes)
        return (
            f"machine: memory {nodes} GB/s a node, {r.read_all_bytes / 1e9:.1f} together; host to "
            f"device {copies} GB/s ({self.source})"
        )


def known_rates(
    runtime: CpuRuntime,
    devices: Sequence[Device],
    folder: Path | None,
    formats: Sequence[WeightFormat],
    measure: Measure | None,
    *,
    anew: bool = False,
    now_unix_s: Callable[[], float] = time.time,
) -> KnownRates | None:
    """What is kept in `folder` for this machine, these devices and formats, or else measured and
    kept there. What was measured while other processes had the CPUs is used, but not kept.

    measure: None: do not; the answer is None then where nothing is kept.
    anew: measure in any case.
    """
    file = None if folder is None else folder / FILE_NAME
    key = identity(runtime, devices)
    all_kept = kept.read(file)
    found = MachineRates.from_json(all_kept.get(key))
    if found is not None and not anew and set(formats) <= set(found.gemm_flops):
        age = _age(now_unix_s() - found.measured_unix_s)
        return KnownRates(found, key, f"measured {age} ago, {file}")
    if measure is None:
        return None
    begin = time.perf_counter()
    rates, share = measure(formats)
    source = f"measured in {time.perf_counter() - begin:.1f} s"
    if found is not None:
        rates = found.merged(rates)
    if share < LEAST_SHARE:
        source += f", not kept: other processes had {1 - share:.0%} of the CPUs' time meanwhile"
    elif file is not None and kept.write(file, {**all_kept, key: rates.as_json()}):
        source += f", kept in {file}"
    return KnownRates(rates, key, source)


def identity(runtime: CpuRuntime, devices: Sequence[Device]) -> str:
    """What rates hold for: the CPU, its threads, the memory's topology, the devices, this version
    of the kernels.
    """
    kinds: dict[str, int] = {}
    for device in devices:
        kind = "" if device.platform == "cpu" else f" {device.device_kind}"
        kinds[device.platform + kind] = kinds.get(device.platform + kind, 0) + 1
    return (
        f"{_VERSION}: jaxmoe {metadata.version('jaxmoe')}, {cpu_name()} ({cpu_id()}), "
        f"{runtime.isa}, {runtime.num_threads} threads, {memory_topology()}, devices "
        + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    )


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
