"""The machine a figure was measured on, and the two roofs it is stated against.

A roof is measured just before and just after its figure, by the same process on the same CPUs:
what shared machines deliver changes from minute to minute.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.common.machine import cpu_id, cpu_name
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime

_SAMPLES = 3  # of each roof before and after a figure: together more than the five that are asked


def machine(runtime: CpuRuntime) -> dict[str, Any]:
    """Name, instruction set, threads and load, for the report and the JSON."""
    return {
        "cpu": cpu_name(),
        "cpu_id": cpu_id(),
        "isa": runtime.isa,
        "threads": runtime.num_threads,
        "numa_nodes": runtime.num_nodes,
        "logical_cpus": os.cpu_count(),
        "description": runtime.describe(),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
    }


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What the runtime's threads can read and compute at most; one entry a sample.

    read: bytes per second. flops: of every way to multiply that the instruction set has.
    """

    read: Sequence[float]
    flops: Mapping[str, Sequence[float]]

    @property
    def read_ceiling(self) -> float:
        """Bytes per second, median."""
        return statistics.median(self.read)

    @property
    def peak(self) -> tuple[str, float]:
        """The fastest way to multiply and its operations per second, median."""
        medians = {name: statistics.median(rates) for name, rates in self.flops.items()}
        name = max(medians, key=lambda n: medians[n])
        return name, medians[name]


@dataclasses.dataclass(frozen=True)
class Work:
    """One thing measured. seconds: of each repeat; bytes and flops: of one repeat (medians where
    repeats differ). tokens: that one repeat computes, where that means something.
    """

    seconds: Sequence[float]
    bytes: float
    flops: float
    tokens: float | None = None


class Bench:
    """Measures figures of one runtime. on_figure: told each as it is done."""

    def __init__(
        self,
        runtime: CpuRuntime,
        ceiling_bytes: int,
        on_figure: Callable[[dict[str, Any]], None] = lambda figure: None,
    ) -> None:
        self.runtime = runtime
        self._ceiling_bytes = ceiling_bytes
        self._on_figure = on_figure
        self.figures: list[dict[str, Any]] = []

    def figure(self, name: str, what: Mapping[str, Any], work: Callable[[], Work]) -> Work:
        """Runs `work` between two looks at the roofs and keeps what came out."""
        before = self._roofs()
        done = work()
        after = self._roofs()
        roofs = Roofs(
            [*before.read, *after.read],
            {n: [*before.flops[n], *after.flops[n]] for n in before.flops},
        )
        found = figure_of(name, self.runtime.num_threads, what, done, roofs)
        self.figures.append(found)
        self._on_figure(found)
        return done

    def _roofs(self) -> Roofs:
        read = self.runtime.read_bandwidth(self._ceiling_bytes, _SAMPLES)
        return Roofs(read, measure.peak_flops(self.runtime, _SAMPLES))


def figure_of(
    name: str, threads: int, what: Mapping[str, Any], work: Work, roofs: Roofs
) -> dict[str, Any]:
    """Everything about a figure, ready for JSON; rates are those of the median repeat."""
    seconds = statistics.median(work.seconds)
    ceiling, (peak_name, peak) = roofs.read_ceiling, roofs.peak
    # The least time the machine allows: the larger of reading the bytes and doing the arithmetic.
    least = max(work.bytes / ceiling, work.flops / peak)
    return {
        "name": name,
        "threads": threads,
        **what,
        "seconds": list(work.seconds),
        "bytes": work.bytes,
        "flops": work.flops,
        "read_ceiling_samples": list(roofs.read),
        "peak_samples": {n: list(rates) for n, rates in roofs.flops.items()},
        "median_seconds": seconds,
        "read_ceiling_bytes_per_s": ceiling,
        "peak": peak_name,
        "peak_flops_per_s": peak,
        "bytes_per_s": work.bytes / seconds,
        "flops_per_s": work.flops / seconds,
        "fraction_of_read_ceiling": work.bytes / seconds / ceiling,
        "fraction_of_peak": work.flops / seconds / peak,
        "fraction_of_roofline": least / seconds,
        "tokens_per_s": None if work.tokens is None else work.tokens / seconds,
    }


def describe(f: Mapping[str, Any]) -> str:
    """A figure for people, on one line."""
    bound = "bytes" if f["fraction_of_read_ceiling"] >= f["fraction_of_peak"] else "arithmetic"
    rate = "" if f["tokens_per_s"] is None else f"  {f['tokens_per_s']:9.2f} tok/s"
    seconds = f["median_seconds"]
    return (
        f"{f['name']:48} {f['threads']:3} thr {seconds * 1e3:10.3f} ms{rate}"
        f"  {f['bytes_per_s'] / 1e9:7.2f} GB/s = {f['fraction_of_read_ceiling']:.2f} of "
        f"{f['read_ceiling_bytes_per_s'] / 1e9:.1f}"
        f"  {f['flops_per_s'] / 1e9:8.1f} GFLOP/s = {f['fraction_of_peak']:.2f} of "
        f"{f['peak_flops_per_s'] / 1e9:.0f}"
        f"  {f['fraction_of_roofline']:.2f} of the roofline ({bound})"
    )
