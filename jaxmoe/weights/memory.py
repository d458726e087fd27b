"""How much memory there is, asked before it is taken: a refusal in words instead of the OOM
killer.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

from jaxmoe.common.errors import CapacityError

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62  # version 1 says "none" by a number near 2^63


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


class Room(NamedTuple):
    """Memory that this process may still take, and what sets that bound."""

    free_bytes: int
    source: str


def rooms(cgroup_root: Path = _CGROUP) -> list[Room]:
    """The machine's free memory, then what each limited control group of this process leaves."""
    memory = psutil.virtual_memory()
    found = [Room(memory.available, "free memory of the machine")]
    for folder in _own_cgroups(cgroup_root):
        limit = _number(folder / "memory.max")  # version 2
        used, stat, file_key = _number(folder / "memory.current"), folder / "memory.stat", "file"
        if limit is None:  # version 1
            limit = _number(folder / "memory.limit_in_bytes")
            used, file_key = _number(folder / "memory.usage_in_bytes"), "total_cache"
        if limit is None or used is None or limit >= _NO_LIMIT:
            continue
        # The page cache counts as used, but the kernel drops it first.
        cache = _stat(stat, file_key) - _stat(stat, "shmem")
        free = max(limit - used + max(cache, 0), 0)
        found.append(Room(free, f"limit {gib(limit)} of control group {folder}"))
    return found


def available_bytes(cgroup_root: Path = _CGROUP) -> int:
    """What this process may still take: the machine's, or a container limit's if that is less."""
    return max(min(room.free_bytes for room in rooms(cgroup_root)), 0)


_SMALLER = (
    "use a smaller or more strongly quantized checkpoint (backing='mmap' pages experts from disk "
    "instead)"
)


def require(planned: int, what: str, change: str = _SMALLER) -> int:
    """Refuses to begin something that will not fit.

    Args:
      planned: bytes about to be taken.
      what: what for, as the message names it.
      change: what else than more memory would help.

    Returns:
      The bytes available.

    Raises:
      CapacityError: with both numbers.
    """
    room = available_bytes()
    if planned > room:
        raise CapacityError(
            f"{what} needs {gib(planned)} ({planned} bytes) of memory, and {gib(room)} ({room} "
            f"bytes) are available; free some, raise the container's limit, or {change}"
        )
    return room


def peak_rss_bytes() -> int:
    """The most resident memory this process ever had."""
    return _own_status("VmHWM") or psutil.Process().memory_info().rss


def anonymous_bytes() -> int:
    """Resident memory of this process that no file stands behind: what ending it would free."""
    return _own_status("RssAnon") or 0


def _own_status(key: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _own_cgroups(root: Path) -> list[Path]:
    """This process's control group and its parents, for both versions of the interface."""
    folders = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        folder = base / path.lstrip("/")
        folders += [folder, *(p for p in folder.parents if p == base or base in p.parents)]
        folders.append(base)  # inside a container the path may be the host's
    return list(dict.fromkeys(folders))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _stat(file: Path, key: str) -> int:
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except OSError:
        pass
    return 0
