"""A crossover chosen by a short measurement on this machine, kept on disk with the CPU's identity.

What may be chosen so is what changes no result. The order of additions of every output is fixed
within a kernel family, whatever the number of rows, the threads and the cut of the work, so only
the cut is: up to `few_tokens` rows of a matrix its weights are read in long runs, beyond in pieces
that a second-level cache holds. The choice between families (and so between kernels that round
differently) is made by the kind of program, never by a measurement or a row count.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.common.machine import cpu_id, cpu_name
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.random_init import random_experts

_log = logging.getLogger(__name__)

LEAST_EXPERT_BYTES = 1 << 30  # smaller models start sooner than this takes
ROWS = (1, 2, 4, 6, 8, 12, 16, 24)
_VERSION = 1  # of what is measured; another one is measured anew
_EXPERTS_A_CALL = 8
# Small experts, of which a call reads 38 MB in FP8: where the cut matters most.
_HIDDEN, _INTERMEDIATE = 2048, 768
_NUM_EXPERTS = 40  # 190 MB
_REPEATS = 5
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
    runtime: CpuRuntime, folder: Path | None, measure_at: Measure | None = None
) -> Calibration:
    """Sets the runtime's crossover: from `folder`, or else by measuring, which it then keeps there.

    measure_at: for tests; seconds of long runs and of pieces, at so many rows.
    """
    file = None if folder is None else folder / "calibration.json"
    key = identity(runtime)
    kept = _read(file)
    if key in kept:
        few = kept[key]
        runtime.set_few_tokens(few)
        return Calibration(few, f"measured earlier, {file}")
    begin = time.perf_counter()
    if measure_at is None:
        with _Experts(runtime) as experts:
            few = crossover(ROWS, experts.measure)
    else:
        few = crossover(ROWS, measure_at)
    seconds = time.perf_counter() - begin
    runtime.set_few_tokens(few)
    if file is not None:
        _write(file, kept | {key: few})
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


class _Experts:
    """Random FP8 experts to measure with, for the length of a `with`."""

    def __init__(self, runtime: CpuRuntime) -> None:
        self._runtime = runtime

    def __enter__(self) -> _Experts:
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
        for _ in range(_REPEATS):
            for few, found in ((rows, seconds[0]), (0, seconds[1])):
                self._runtime.set_few_tokens(few)
                found += measure.experts(self._runtime, self._store, "vector", ids, 1).seconds
        return statistics.median(seconds[0]), statistics.median(seconds[1])


def _read(file: Path | None) -> dict[str, int]:
    """What is kept; nothing where the file is missing or not ours."""
    if file is None:
        return {}
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {
        key: few
        for key, few in kept.items()
        if isinstance(few, int) and not isinstance(few, bool) and 0 <= few <= max(ROWS)
    }


def _write(file: Path, kept: dict[str, int]) -> None:
    """Whole or not at all; a folder that cannot be written only costs the next start its time."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(file)
    except OSError as e:
        _log.warning("%s is not kept: %s", file, e.strerror)
        with contextlib.suppress(OSError):
            part.unlink()
