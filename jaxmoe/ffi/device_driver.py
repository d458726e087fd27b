"""DeviceDriver: what only a device has (copies, events, page-locking), or host memory for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import _native
from jaxmoe.ffi.host_store import NativeHostStore

Device: TypeAlias = Any  # jax.Device, which is no type to a type checker
# (bytes locked so far, bytes in all)
LockProgress = Callable[[int, int], None]


class DeviceDriver:
    """A device's copy engine. Made by `cuda`, `host` or `for_device`."""

    def __init__(self, native: _native.DeviceDriver):
        self._native = native

    @classmethod
    def cuda(cls, ordinal: int) -> DeviceDriver:
        """Of an NVIDIA GPU, by the CUDA driver library.

        Raises: ConfigError, which says what is missing: the library, the device or an entry point.
        """
        try:
            return cls(_native.DeviceDriver.cuda(ordinal))
        except OSError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def host(
        cls,
        bytes_per_s: float | None = None,
        *,
        max_delay_s: float = 0.0,
        seed: int = 1,
        max_registered_bytes: int | None = None,
        copies_need_registered: bool = False,
    ) -> DeviceDriver:
        """Of a CPU device: copies are memcpys by a thread.

        bytes_per_s: limit of all its copies together, so that they take the time a bus would.
        The rest is for tests: random delays before every operation, a limit of page-locked memory,
        and copies that refuse memory which is not page-locked.
        """
        return cls(
            _native.DeviceDriver.host(
                bytes_per_s or 0.0,
                max_delay_s,
                seed,
                -1 if max_registered_bytes is None else max_registered_bytes,
                copies_need_registered,
            )
        )

    @classmethod
    def for_device(cls, device: Device) -> DeviceDriver:
        """The driver of a JAX device. Raises: ConfigError for a platform that has none."""
        if device.platform == "cpu":
            return cls.host()
        if device.platform in ("gpu", "cuda") and device.local_hardware_id is not None:
            return cls.cuda(device.local_hardware_id)
        raise ConfigError(f"no device driver for {device}: wanted a CPU device or an NVIDIA GPU")

    @property
    def native(self) -> _native.DeviceDriver:
        return self._native

    @property
    def is_host(self) -> bool:
        return self._native.is_host

    def limit_rate(self, bytes_per_s: float | None) -> None:
        """Another limit of a CPU device's copies from now on, as in `host`. Raises: ValueError for
        a GPU, whose bus is what it is.
        """
        self._native.limit_rate(bytes_per_s or 0.0)

    def describe(self) -> str:
        """One line for the start-up report."""
        return self._native.describe()

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the device. Raises: OSError, also for a CPU device."""
        return self._native.memory_info()

    def copy_rate(
        self, device: jax.Array, host: np.ndarray, repeats: int = 5, *, to_device: bool = True
    ) -> list[float]:
        """Bytes per second of copies of all of `host` to the memory of `device`, or from it.

        What streaming is measured against, so both should be large, and `host` page-locked.
        `device` is overwritten, or `host` is.

        Raises: ValueError where the two have other sizes; OSError where a copy fails.
        """
        array = bytes_of(host)
        if array.nbytes != device.nbytes or repeats < 1:
            raise ValueError(
                f"copy_rate between {array.nbytes} and {device.nbytes} bytes, {repeats} times; "
                "wanted equal sizes and at least once"
            )
        address = device.block_until_ready().unsafe_buffer_pointer()
        return self._native.copy_rate(address, array, repeats, to_device)

    def lock_store(self, store: NativeHostStore, progress: LockProgress | None = None) -> None:
        """Page-locks a host store's weights and scales until it is closed, for all GPUs.

        To be called when the store is full and before jobs are made of it. Takes seconds for tens
        of GB; `progress` may raise to end it.

        Raises: OSError, which names the range that the machine refused; nothing is locked then.
        """
        store.lock_pages(self._native, progress)

    def lock_arrays(
        self, arrays: Mapping[str, np.ndarray], progress: LockProgress | None = None
    ) -> _native.PageLock:
        """Page-locks arrays, named for errors, until the result is closed or dropped.

        Raises: OSError.
        """
        return _native.PageLock(
            self._native, [(name, bytes_of(array)) for name, array in arrays.items()], progress
        )


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The array's memory as uint8 `[nbytes]`, not a copy. Raises: ValueError unless contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array {array.dtype}{list(array.shape)} that is not contiguous")
    return array.reshape(-1).view(np.uint8)
