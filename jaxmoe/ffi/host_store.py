"""The native host store, for its Python face in weights/host_store.py."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import _native
from jaxmoe.ffi._native import HostStore as NativeHostStore
from jaxmoe.ffi.cpu_runtime import CpuRuntime

__all__ = ["NativeHostStore", "native_host_store"]


def native_host_store(
    runtime: CpuRuntime, layers: Sequence[tuple[int, int, int, str]], backing: str
) -> NativeHostStore:
    """A store for MoE layers of `(num_experts, intermediate, hidden, format)` each.

    Its rows are split over `runtime`'s NUMA nodes. Raises ConfigError for impossible sizes, formats
    or backings, and where memory cannot be had on a node.
    """
    try:
        return _native.HostStore(runtime.native, list(layers), backing)
    except ValueError as error:
        raise ConfigError(str(error)) from None
