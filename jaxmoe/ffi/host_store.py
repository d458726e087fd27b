"""The native host store, for its Python face in weights/host_store.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jaxmoe.ffi import _native
from jaxmoe.ffi.cpu_runtime import CpuRuntime

NativeHostStore: TypeAlias = _native.HostStore


def native_host_store(
    runtime: CpuRuntime, layers: Sequence[tuple[int, int, int, str]], backing: str
) -> NativeHostStore:
    """A store for these MoE layers, split as `runtime`'s NUMA nodes are.

    Args:
        runtime: whose topology counts.
        layers: num_experts, intermediate, hidden and weight format of each.
        backing: "arena" or "mmap".
    """
    return _native.HostStore(runtime.native, list(layers), backing)
