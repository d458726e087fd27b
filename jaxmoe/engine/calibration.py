"""A crossover chosen by a short measurement on this machine, kept on disk with the CPU's identity.

What may be chosen so is what changes no result. The order of additions of every output is fixed
within a kernel family, whatever the number of rows, the threads and the cut of the work, so only
the cut is: up to `few_tokens` rows of a matrix its weights are read in long runs, beyond in pieces
that a second-level cache holds. The choice between families (and so between kernels that round
differently) is made by the kind of program, never by a measurement or a row count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.common.machine import cpu_id, cpu_name
from jaxmoe.engine import kept
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.random_init import random_experts

LEAST_EXPERT_BYTES = 1 << 30  # smaller models start sooner than this takes
ROWS = (1, 2, 4, 6, 8, 12, 16, 24)
_VERSION = 1  # of what is measured; another one is measured anew
_EXPERTS_A_CALL = 8
# Small experts, of which a call reads 38 MB in FP8: where the cut matters most.
_HIDDEN, _INTERMEDIATE = 2048, 768
_NUM_EXPERTS = 40  # 190 MB
_REPEATS = 5
_LEAST_SHARE = 0.9  # hand-outs and a clock tick apart, threads with work run all the time
_MARGIN = 1.02  # what medians of five differ by without a cause

Measure = Callable[[int], tuple[float, float]]


class Calibration(NamedTuple):
    """few_tokens, and for people where it comes from."""

    few_tokens: int
    source: str

    def describe(self) -> str:
        return (
            f"work in long runs of memory up to {self.few_tokens} tokens an expert ({self.source})"
        )


def calibrate(
    runtime: CpuRuntime, folder: Path | None, experts: Experts | None = None
) -> Calibration:
    """Sets the runtime's crossover: from `folder`, or else by measuring, which it then keeps there.

    What was measured while other processes had the CPUs is neither used nor kept.
    experts: what to measure with; for tests.
    """
    file = None if folder is None else folder / "calibration.json"
    key = identity(runtime)
    known = _read(file)
    if key in known:
        few = known[key]
        runtime.set_few_tokens(few)
        return Calibration(few, f"measured earlier, {file}")
    default = runtime.few_tokens
    begin = time.perf_counter()
    with experts or Experts(runtime) as measured:
        few = crossover(ROWS, measured.measure)
        share = measured.cpu_share
    seconds = time.perf_counter() - begin
    if share < _LEAST_SHARE:
        runtime.set_few_tokens(default)
        return Calibration(
            default,
            f"not measured: other processes had {1 - share:.0%} of the CPUs' time meanwhile",
        )
    runtime.set_few_tokens(few)
    if file is not None:
        kept.write(file, known | {key: few})
    return Calibration(few, f"measured in {seconds:.1f} s")


def crossover(rows: Sequence[int], measure_at: Measure) -> int:
    """The most rows up to which long runs are never slower; 0 where they are from the first on."""
    most = 0
    for count in rows:
        long_s, pieces_s = measure_at(count)
        if long_s > _MARGIN * pieces_s:
            break
        most = count
    return most


def identity(runtime: CpuRuntime) -> str:
    """What an answer holds for."""
    return (
        f"{_VERSION}: {cpu_name()} ({cpu_id()}), {runtime.isa}, {runtime.num_threads} threads, "
        f"{runtime.num_nodes} nodes"
    )


class Experts:
    """Random FP8 experts to measure with, for the length of a `with`."""

    def __init__(self, runtime: CpuRuntime) -> None:
        self._runtime = runtime
        self._wall_s = self._cpu_s = 0.0

    @property
    def cpu_share(self) -> float:
        """Of the threads' time, what they ran: they never sleep while there is work."""
        return self._cpu_s / (self._wall_s * self._runtime.num_threads)

    def __enter__(self) -> Experts:
        layout = ExpertLayout(_NUM_EXPERTS, _INTERMEDIATE, _HIDDEN, "fp8_block")
        self._store = random_experts(self._runtime, layout)
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def measure(self, rows: int) -> tuple[float, float]:
        """Seconds of a pass over all experts with `rows` tokens each: in long runs, in pieces."""
        order = np.arange(_NUM_EXPERTS, dtype=np.int32).reshape(-1, 1, _EXPERTS_A_CALL)
        ids = np.repeat(order, rows, axis=1)
        seconds: tuple[list[float], list[float]] = [], []
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for _ in range(_REPEATS):
            for few, found in ((rows, seconds[0]), (0, seconds[1])):
                self._runtime.set_few_tokens(few)
                found += measure.experts(self._runtime, self._store, "vector", ids, 1).seconds
        self._wall_s += time.perf_counter() - wall_s
        self._cpu_s += time.process_time() - cpu_s
        return statistics.median(seconds[0]), statistics.median(seconds[1])


def _read(file: Path | None) -> dict[str, int]:
    """What is kept and can be an answer."""
    return {
        key: few
        for key, few in kept.read(file).items()
        if isinstance(few, int) and not isinstance(few, bool) and 0 <= few <= max(ROWS)
    }
