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
    """Makes the `jaxmoe_*` custom calls known to platform "cpu", and where JAX has a CUDA backend
    those of "CUDA" to it; later calls do nothing."""
    global _registered
    with _lock:
        if _registered:
            return
        jax.local_devices(backend="cpu")
        for name, handler in _native.handlers().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        if _has_cuda():
            for name, handler in _native.cuda_handlers().items():
                jax.ffi.register_ffi_target(name, handler, platform="CUDA")
        _registered = True


def _has_cuda() -> bool:
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:  # JAX's answer where there is none
        return False
