"""CpuRuntime: the threads, NUMA nodes and instruction set that native operations run on.

One per engine. Compiled programs name it by a small integer id; the lowest free id is given out, so
a process that creates its objects in the same order compiles the same programs.
"""

from __future__ import annotations

import types
from typing import Literal, Self

import numpy as np

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import _native
from jaxmoe.ffi.registry import register_targets

_TRACE_LEVELS = ("off", "seconds", "events")


class CpuRuntime:
    """A pool of pinned worker threads and the kernels they run.

    num_threads: threads that take part in an operation, the caller's included; default one per core
        the process may use, at most what its cgroup's CPU quota pays for.
    numa_nodes: a made-up topology instead of the machine's, e.g. `[[0], [1]]`: CPUs of each node.
        For tests; memory is not bound.
    isa: "scalar", "avx2", "avx512", "avx512_bf16" or "amx" instead of the best the CPU has. For
        tests.
    device_signal: how a GPU's stream and the threads tell each other, "values" (stream memory
        operations) or "host_functions", instead of the best the driver has. For tests.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        numa_nodes: list[list[int]] | None = None,
        isa: str | None = None,
        device_signal: Literal["values", "host_functions"] | None = None,
    ):
        register_targets()
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"num_threads is {num_threads}; wanted at least 1, or None")
        try:
            self._native = _native.Runtime(num_threads or 0, numa_nodes, isa, device_signal)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def native(self) -> _native.Runtime:
        return self._native

    @property
    def id(self) -> int:
        return self._native.id

    @property
    def num_threads(self) -> int:
        return self._native.num_threads

    @property
    def num_nodes(self) -> int:
        return self._native.num_nodes

    @property
    def isa(self) -> str:
        return self._native.isa

    def describe(self) -> str:
        """One line for the start-up report: threads, topology, instruction set and why."""
        return self._native.describe()

    def kernel_name(
        self, family: Literal["vector", "matrix"], weight_format: str, *, bf16_activations: bool
    ) -> str:
        """The kernel that a program of this family gets: format, arithmetic and instruction set.

        "f32" in the arithmetic's place: activations stay FP32 throughout; "bf16": they are rounded
        to it, also between an expert's stages.
        weight_format: "bf16", "f32" or "fp8_block".
        """
        code = 0 if family == "vector" else 1
        return self._native.kernel_name(code, weight_format, bf16_activations)

    def stats(self) -> dict[str, int]:
        """Totals since creation: calls, distinct experts, weight and cache bytes read, arithmetic,
        and nanoseconds by part where they are counted (`set_trace_level`).
        """
        return self._native.stats()

    def device_stats(self) -> dict[str, float]:
        """Of experts for activations on a GPU: calls served, experts_s seconds spent in them, and
        idle_s seconds in which programs were under way but no call had been handed over yet.
        """
        return self._native.device_stats()

    def describe_device(self) -> str:
        """How GPUs hand their calls over; empty before the first of them."""
        return self._native.describe_device()

    def check_device(self) -> None:
        """Raises RuntimeError with what failed on the CPU in a GPU's program, once. The next step
        would raise it too; the failed step's results are NaN.
        """
        try:
            self._native.check_device()
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def read_bandwidth(
        self, total_bytes: int = 1 << 30, repeats: int = 5, *, node: int | None = None
    ) -> list[float]:
        """Bytes per second that as many threads, on the same CPUs, read from DRAM; one a repeat.

        The ceiling that bandwidth figures are stated against: measure it in the same minute.
        `total_bytes` must be far larger than the last-level cache. node: only its threads and its
        memory, instead of all. Raises: ValueError where none of the threads is on it.
        """
        return _native.read_bandwidth(
            self._native, total_bytes, repeats, -1 if node is None else node
        )

    @property
    def few_tokens(self) -> int:
        """Activation rows of a matrix up to which work is handed out in long runs of memory."""
        return self._native.few_tokens

    def set_few_tokens(self, tokens: int) -> None:
        """Changes speed only: no sum's order depends on it."""
        if tokens < 0:
            raise ConfigError(f"few_tokens is {tokens}; wanted at least 0")
        self._native.set_few_tokens(tokens)

    def set_trace_level(self, level: Literal["off", "seconds", "events"]) -> None:
        """What operations note of themselves: nothing, their time, or all units of all threads."""
        self._native.set_trace_level(_TRACE_LEVELS.index(level))

    def take_trace(self) -> list[tuple[str, np.ndarray, int]]:
        """What was noted since the last call: a track a thread, its events int64 `[n, 5]` (begin,
        end, kind, part, detail; see xla_ffi/runtime/trace.h), and how many did not fit.
        """
        return self._native.take_trace()

    def close(self) -> None:
        """Ends the threads. Programs that still name this runtime get an error. Idempotent."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()


def supported_isas() -> list[str]:
    """Instruction sets of this machine that `CpuRuntime(isa=...)` takes, lowest first."""
    return _native.supported_isas()
