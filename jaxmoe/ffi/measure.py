"""What the machine can do, and what the bare kernels do on it: C++ loops, for `jaxmoe_bench`.

Every function runs on the threads and CPUs of a `CpuRuntime`, so that a figure and the ceiling it
is stated against are those of the same threads. Measure both in the same minute: machines are
shared, and their clocks and memory change.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from jaxmoe.ffi import _native
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.linear import FAMILY_CODES, Family


class NativeStore(Protocol):
    """What is needed of a host store."""

    @property
    def native(self) -> _native.HostStore: ...


class Measured(NamedTuple):
    """seconds: of each repeat. bytes: of weights and scales that one reads. flops: of one; a
    multiply-add counts as two.
    """

    seconds: list[float]
    bytes: int
    flops: float


def peak_flops(runtime: CpuRuntime, repeats: int = 5) -> dict[str, list[float]]:
    """Operations per second of every way to multiply that the runtime's instruction set has.

    Vector units from registers, tiles with their loads from the first-level cache; one a repeat.
    """
    return dict(_native.peak_flops(runtime.native, repeats))


def kernel(
    runtime: CpuRuntime,
    store: NativeStore,
    family: Family,
    num_experts: int,
    rows: int,
    repeats: int,
    *,
    layer: int = 0,
    bf16_activations: bool = True,
) -> Measured:
    """The bare kernel over gate and up of a layer's first `num_experts` experts, each once a
    repeat, with `rows` activation rows. The matrices must be loaded; for cold weights they must be
    far larger than the last-level cache together.

    Raises ValueError where they are not loaded.
    """
    code = int(FAMILY_CODES[family])
    return Measured(
        *_native.measure_kernel(
            runtime.native, store.native, layer, code, bf16_activations, num_experts, rows, repeats
        )
    )


def empty_job(runtime: CpuRuntime, calls: int, repeats: int) -> Measured:
    """Jobs of one unit a thread that does nothing, `calls` of them a repeat."""
    return Measured(*_native.measure_empty_job(runtime.native, calls, repeats))


def experts(
    runtime: CpuRuntime,
    store: NativeStore,
    family: Family,
    ids: np.ndarray,
    repeats: int,
    *,
    layer: int = 0,
    bf16_activations: bool = True,
) -> Measured:
    """The routed-experts operation, called once for each of `ids [calls, T, A]` a repeat (-1: no
    expert).

    Raises ValueError as the operation does: ids out of range, experts that are not loaded.
    """
    code = int(FAMILY_CODES[family])
    ids = np.ascontiguousarray(ids, np.int32)
    return Measured(
        *_native.measure_experts(
            runtime.native, store.native, layer, code, bf16_activations, ids, repeats
        )
    )
