"""Registration of the native FFI targets with JAX.

Targets are registered once per process, on first use, and after the CPU backend exists: before it,
JAX replays registrations in an order that XLA refuses.
"""

from __future__ import annotations

import threading

import jax

from jaxmoe.ffi import _native

# What an operation that refuses its operands raises at run time: the first call of a program gives
# the one, calls of a cached program the other.
NATIVE_ERRORS = (jax.errors.JaxRuntimeError, ValueError)

_lock = threading.Lock()
_registered = False


def register_targets() -> None:
    """Makes the `jaxmoe_*` custom calls known to platform "cpu" and, where JAX has one, to "CUDA";
    later calls do nothing.
    """
    global _registered
    with _lock:
        if _registered:
            return
        jax.local_devices(backend="cpu")
        for name, handler in _native.handlers().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        if has_cuda():
            register_cuda_targets()
        _registered = True


def has_cuda() -> bool:
    """Whether JAX runs on CUDA devices here; starts its backends."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:  # no plugin, no driver, or JAX_PLATFORMS leaves it out
        return False


def register_cuda_targets() -> None:
    """For programs that are compiled for CUDA on a machine without it, too."""
    for name, handler in _native.cuda_handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")
