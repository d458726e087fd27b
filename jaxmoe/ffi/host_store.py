"""The native host store, for its Python face in weights/host_store.py."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.ffi import _native
from jaxmoe.ffi._native import HostStore as NativeHostStore
from jaxmoe.ffi.cpu_runtime import CpuRuntime

__all__ = ["NativeHostStore", "native_host_store"]


def native_host_store(
    runtime: CpuRuntime, layers: Sequence[tuple[int, int, int, str]], backing: str
) -> NativeHostStore:
    """A store for these MoE layers (num_experts, intermediate, hidden, format), split as
    `runtime`'s NUMA nodes are.
    """
    return _native.HostStore(runtime.native, [tuple(layer) for layer in layers], backing)
