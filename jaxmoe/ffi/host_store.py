"""The native host store, for its Python face in weights/host_store.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jaxmoe.common.errors import ConfigError
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

    Raises:
        ConfigError: for impossible sizes, formats or backings, and where a node has no memory.
    """
    try:
        return _native.HostStore(runtime.native, list(layers), backing)
    except ValueError as error:
        raise ConfigError(str(error)) from None
