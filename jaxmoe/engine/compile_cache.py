"""Compiled programs kept on disk, so that the second start compiles nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

_log = logging.getLogger(__name__)


def enable(path: Path | None) -> str:
    """Points JAX's persistent cache at `path`, unless the process chose one itself.

    Returns the directory in use, "" where programs are not kept.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen:
        return str(chosen)
    if path is None:
        return ""
    path = path / "programs"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        _log.warning("compiled programs are not kept: %s: %s", path, e.strerror)
        return ""
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return str(path)
