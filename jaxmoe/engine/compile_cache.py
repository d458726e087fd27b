"""Compiled programs kept on disk, so that the second start compiles nothing."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import logging
import os
import platform
import stat
from pathlib import Path

import jax

_log = logging.getLogger(__name__)


def machine_fingerprint() -> str:
    """Names the instruction sets and jaxlib that programs are compiled for.

    XLA's CPU programs are machine code: one compiled with AVX-512 must not be met by a machine
    without it that shares the home directory.
    """
    features = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            features = next((line for line in cpuinfo if line.startswith("flags")), features)
    except OSError as e:
        _log.warning("compiled programs are kept without the CPU's name: /proc/cpuinfo: %s", e)
    named = " ".join(sorted(features.split())) + importlib.metadata.version("jaxlib")
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def _make_own(path: Path) -> None:
    """A directory that nobody else can write to: what lies there is run as machine code."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "not a directory of this user; choose another cache_dir")
    if stat.S_IMODE(found.st_mode) != 0o700:  # of an older version, or made by hand
        path.chmod(0o700)


def enable(path: Path | None) -> str:
    """Points JAX's persistent cache at `path`, unless the process chose one itself.

    The directories it makes are this user's alone. Returns the directory in use, "" where programs
    are not kept.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen:
        return str(chosen)
    if path is None:
        return ""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in ("programs", machine_fingerprint()):
            path = path / name
            _make_own(path)
    except OSError as e:
        _log.warning("compiled programs are not kept: %s: %s", path, e.strerror)
        return ""
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return str(path)
