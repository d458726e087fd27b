"""The experts' shared memory: named, held while in use, removed when not.

A named store (xla_ffi/runtime/shared_segment.h) is a file of /dev/shm that outlives the engine, so
that a restarted engine attaches to its weights. Whoever uses a store holds a shared lock on it,
which the kernel drops with the process; a store that nobody holds was left behind, and the next
start of the same checkpoint uses it while that of another one removes it.

What it does not do: map or fill anything (host_store.py), or make names (store_name.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DIRECTORY = Path("/dev/shm")
_PREFIX = "jaxmoe-weights-"


class StoreName(NamedTuple):
    """name: as for shm_open, with its slash. fingerprint: 32 bytes, of the weights it holds."""

    name: str
    fingerprint: bytes

    @classmethod
    def of(cls, fingerprint: bytes) -> StoreName:
        return cls(f"/{_PREFIX}{os.geteuid()}-{fingerprint[:8].hex()}", fingerprint)


def present_bytes(name: str) -> int:
    """Memory that a store takes already; 0 where there is none."""
    try:
        return os.stat(_path(name)).st_blocks * 512
    except OSError:
        return 0


def room_bytes() -> int:
    """What /dev/shm still takes; 0 where there is none."""
    try:
        info = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def has_huge_pages() -> bool:
    """Whether shared memory gets huge pages here when it asks for them."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return False
    return any(f"[{word}]" in text for word in ("always", "within_size", "advise", "force"))


class Hold:
    """Keeps a store from being removed as long as this process lives, or until `release`.

    Raises FileNotFoundError where there is none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = os.open(_path(name), os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def release(self, *, remove: bool) -> bool:
        """Lets go; with `remove`, also of the store itself if nobody else holds it. Whether it was
        removed.
        """
        try:
            return remove and _remove_locked(_path(self.name), self._fd)
        finally:
            os.close(self._fd)


def remove_unused(keep: Iterable[str] = ()) -> list[str]:
    """Removes this user's stores that nobody holds, but for those named in `keep`; their names."""
    removed = []
    for path in sorted(DIRECTORY.glob(f"{_PREFIX}{os.geteuid()}-*")):
        name = f"/{path.name}"
        if name in keep:
            continue
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _remove_locked(path, fd):
                    removed.append(name)
            finally:
                os.close(fd)
    return removed


def _remove_locked(path: Path, fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Still the file of that name, and not one made since.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            os.unlink(path)
            return True
    return False


def _path(name: str) -> Path:
    return DIRECTORY / name.removeprefix("/")
