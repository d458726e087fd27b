"""The native host store, for its Python face in weights/host_store.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import _native
from jaxmoe.ffi.cpu_runtime import CpuRuntime

NativeHostStore: TypeAlias = _native.HostStore


def native_host_store(
    runtime: CpuRuntime,
    layers: Sequence[tuple[int, int, int, str]],
    backing: str,
    shared_name: str = "",
    fingerprint: bytes = b"",
) -> NativeHostStore:
    """A store for these MoE layers, split as `runtime`'s NUMA nodes are.

    Args:
        runtime: whose topology counts.
        layers: num_experts, intermediate, hidden and weight format of each.
        backing: "arena" or "mmap".
        shared_name: of the shared memory that holds the arena; empty: private memory.
        fingerprint: 32 bytes that say whose weights a shared arena holds.

    Raises:
        ConfigError: for impossible sizes, formats or backings, where a node has no memory, and
            where the shared memory cannot be used.
    """
    try:
        return _native.HostStore(runtime.native, list(layers), backing, shared_name, fingerprint)
    except ValueError as error:
        raise ConfigError(str(error)) from None
