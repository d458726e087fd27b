"""Descriptors of many files, opened when needed and closed when there are too many.

A checkpoint may have thousands of files and a process is allowed about a thousand descriptors. What
stays is each file's identity: one that was replaced, cut or written to since it was checked is
refused when it is used.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxmoe.common.errors import CheckpointError
from jaxmoe.weights.safetensors_header import fail, open_regular

_MAX_OPEN = 128


class _Entry:
    def __init__(self, fd: int) -> None:
        self.fd, self.users = fd, 0


class OpenFiles:
    """Thread-safe. `add` a file while its header is checked, then `use` it for reads."""

    def __init__(self) -> None:
        self._stats: dict[Path, os.stat_result] = {}
        self._open: dict[Path, _Entry] = {}  # least recently used first
        self._lock = threading.Lock()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self._stats)

    def add(self, path: Path, what: str = "file") -> int:
        """Opens a file for the first time and remembers its state; its descriptor, for now."""
        fd = open_regular(path, what)
        with self._lock:
            self._stats[path] = os.fstat(fd)
            self._open[path] = _Entry(fd)
            self._evict()
        return fd

    @contextlib.contextmanager
    def use(self, path: Path, tensor: str) -> Iterator[int]:
        """A descriptor that stays open inside the block; `tensor` is named if the file changed."""
        with self._lock:
            entry = self._open.pop(path, None)
            if entry is None:
                if path not in self._stats:
                    raise CheckpointError(f"{path}: the checkpoint was closed")
                entry = _Entry(open_regular(path))
            self._open[path] = entry
            entry.users += 1
            self._evict()
        try:
            self._check(entry.fd, path, tensor)
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1

    def check_unchanged(self, path: Path, tensor: str) -> None:
        """Refuses a file that was truncated, replaced or written to since it was added."""
        with self.use(path, tensor):
            pass

    def _check(self, fd: int, path: Path, tensor: str) -> None:
        was, now = self._stats[path], os.fstat(fd)
        if now.st_size != was.st_size:
            fail(
                path,
                f"file changed from {was.st_size} to {now.st_size} bytes while it was being read",
                tensor,
            )
        if (now.st_mtime_ns, now.st_ino, now.st_dev) != (was.st_mtime_ns, was.st_ino, was.st_dev):
            fail(
                path,
                "file was written to or replaced while it was being read; load it again",
                tensor,
            )

    def _evict(self) -> None:
        idle = [path for path, entry in self._open.items() if not entry.users]
        for path in idle[: max(len(self._open) - _MAX_OPEN, 0)]:
            os.close(self._open.pop(path).fd)

    def close(self) -> None:
        """Closes everything; later uses are refused."""
        with self._lock:
            entries, self._open, self._stats = list(self._open.values()), {}, {}
        for entry in entries:
            os.close(entry.fd)
