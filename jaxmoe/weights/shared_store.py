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
from collections.abc import Iterable, Iterator
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


class Store(NamedTuple):
    """A store there is: memory that it takes, and whether a process holds it."""

    name: str
    num_bytes: int
    in_use: bool


def stores() -> list[Store]:
    """This user's stores."""
    found = []
    for path, fd in _open_stores():
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            in_use = False
        except BlockingIOError:
            in_use = True
        found.append(Store(f"/{path.name}", os.fstat(fd).st_blocks * 512, in_use))
    return found


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
    keep = set(keep)
    return [
        f"/{path.name}"
        for path, fd in _open_stores()
        if f"/{path.name}" not in keep and _remove_locked(path, fd)
    ]


def _open_stores() -> Iterator[tuple[Path, int]]:
    """This user's stores, each open until the next one is asked for."""
    for path in sorted(DIRECTORY.glob(f"{_PREFIX}{os.geteuid()}-*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not ours to read
            continue
        try:
            yield path, fd
        finally:
            os.close(fd)


def _remove_locked(path: Path, fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Still the file of that name, and not one made since.
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            os.unlink(path)
            return True
    return False


def _path(name: str) -> Path:
    return DIRECTORY / name.removeprefix("/")
