"""jaxmoe_doctor's checks of the machine: CPUs, memory and its limits, disk.

`root` stands before every path read, so that tests can lay out other machines.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from jaxmoe.cli.doctor_check import FAIL, OK, WARN, Check
from jaxmoe.weights import memory as memory_facts
from jaxmoe.weights import shared_store
from jaxmoe.weights.memory import gib

_ROOT = Path("/")
_LEAST_MEMORY = 1 << 30  # the demo model's peak with everything compiled is below it
_LEAST_DISK = 1 << 30  # programs of a few models; see compile_cache.py
_LEAST_FILES = 1024  # shards are opened 128 at a time, a server wants one a connection


def cores() -> Check:
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    found = f"{allowed} of {os.cpu_count()} logical CPUs may be used"
    if quota is not None and quota < allowed:
        return Check(
            "cores",
            WARN,
            f"{found}, but the control group pays for {quota:g} of them",
            "Kernels use as many threads as are paid for; more would be stopped in turns.",
            "Raise the container's CPU limit (docker --cpus, Kubernetes limits.cpu).",
        )
    return Check("cores", OK, found, "Kernels use one thread a physical core.")


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs that the tightest control group pays for, of either version; None without a limit."""
    quotas = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place != base and base not in place.parents:
                break
            try:
                if controllers:
                    given = int((place / "cpu.cfs_quota_us").read_text())
                    period = int((place / "cpu.cfs_period_us").read_text())
                else:
                    text, period = (place / "cpu.max").read_text().split()
                    given = -1 if text == "max" else int(text)
                    period = int(period)
            except (OSError, ValueError):
                continue
            if given > 0:
                quotas.append(given / period)
    return min(quotas, default=None)


def numa(root: Path = _ROOT) -> Check:
    folders = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    nodes = []
    for folder in folders:
        facts = (folder / "meminfo").read_text()
        total = next((x.split()[3] for x in facts.splitlines() if "MemTotal" in x), "0")
        cpus = (folder / "cpulist").read_text().strip()
        nodes.append(f"{folder.name}: CPUs {cpus or 'none'}, {gib(int(total) * 1024)}")
    if not nodes:
        return Check("NUMA", OK, "no nodes listed", "Memory is taken as one piece.")
    found = "; ".join(nodes)
    if len(nodes) == 1:
        return Check("NUMA", OK, found, "One node: memory is equally near to all cores.")
    return Check(
        "NUMA",
        OK,
        found,
        "Every expert is split over the nodes that this process may use, so that all of them read "
        "at once. backing=mmap does not: its pages lie where they were first read.",
    )


def huge_pages(root: Path = _ROOT) -> Check:
    path = root / "sys/kernel/mm/transparent_hugepage/enabled"
    try:
        text = path.read_text()
    except OSError:
        return Check(
            "huge pages",
            WARN,
            "the kernel has no transparent huge pages",
            "Reading weights costs more address translations, some percent of speed.",
            "Use a kernel with CONFIG_TRANSPARENT_HUGEPAGE.",
        )
    chosen = text[text.find("[") + 1 : text.find("]")]
    if chosen == "never":
        return Check(
            "huge pages",
            WARN,
            "transparent huge pages: never",
            "Reading weights costs more address translations, some percent of speed.",
            f"echo madvise > {path}   (as root; lasts until the next boot)",
        )
    return Check("huge pages", OK, f"transparent huge pages: {chosen}", "Weights will use them.")


def memory(root: Path = _ROOT) -> Check:
    rooms = memory_facts.rooms(root / "sys/fs/cgroup")
    tightest = min(rooms, key=lambda room: room.free_bytes)
    found = "; ".join(f"{gib(room.free_bytes)} left by the {room.source}" for room in rooms)
    if tightest.free_bytes < _LEAST_MEMORY:
        return Check(
            "memory",
            FAIL,
            found,
            f"Even the demo model wants about {gib(_LEAST_MEMORY)}.",
            "End other programs, or raise the container's limit.",
        )
    meaning = f"A model may take {gib(tightest.free_bytes)}; --plan_only says what one needs."
    if tightest is not rooms[0]:
        return Check(
            "memory",
            WARN,
            found,
            f"The control group, not the machine, is the bound. {meaning}",
            "Raise the container's limit (docker --memory, Kubernetes limits.memory) for more.",
        )
    return Check("memory", OK, found, meaning)


def overcommit(root: Path = _ROOT) -> Check:
    mode = (root / "proc/sys/vm/overcommit_memory").read_text().strip()
    if mode == "2":
        return Check(
            "overcommit",
            WARN,
            "vm.overcommit_memory is 2 (strict)",
            "Memory counts when it is asked for, not when it is used: large models may be refused "
            "although they fit.",
            "sysctl vm.overcommit_memory=0",
        )
    return Check("overcommit", OK, f"vm.overcommit_memory is {mode}", "Memory counts when used.")


def shared_memory(root: Path = _ROOT) -> Check:
    path = root / "dev/shm"
    if not path.is_dir():
        return Check(
            "shared memory",
            WARN,
            f"{path} is not there",
            "Weights cannot be kept for a restart of the engine, nor shared between processes.",
            "Mount a tmpfs there (docker --shm-size).",
        )
    usage = shutil.disk_usage(path)
    return Check(
        "shared memory",
        OK,
        f"{path}: {gib(usage.free)} of {gib(usage.total)} free",
        "The most that weights which outlive an engine process may take.",
    )


def shared_weights() -> Check:
    name, stores = "shared weights", shared_store.stores()
    unused = [s for s in stores if not s.in_use]
    if not stores:
        return Check(name, OK, f"none of yours in {shared_store.DIRECTORY}")
    found = ", ".join(
        f"{s.name} ({gib(s.num_bytes)}, {'in use' if s.in_use else 'unused'})" for s in stores
    )
    if not unused:
        return Check(name, OK, found, "Engines of the same checkpoint attach to them in seconds.")
    return Check(
        name,
        WARN,
        found,
        f"{gib(sum(s.num_bytes for s in unused))} wait for the next start of their checkpoints.",
        "Start it again, or give the memory back: jaxmoe_doctor --remove_unused_weights",
    )


def remove_unused_weights() -> list[str]:
    """What was removed, and what is in use, for people."""
    sizes = {s.name: s.num_bytes for s in shared_store.stores()}
    removed = shared_store.remove_unused()
    lines = [f"removed {name} ({gib(sizes.get(name, 0))})" for name in removed]
    lines += [f"left {s.name} ({gib(s.num_bytes)}): in use" for s in shared_store.stores()]
    return lines or [f"no weights of yours in {shared_store.DIRECTORY}"]


def limits() -> Check:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    unlimited = resource.RLIM_INFINITY
    found = (
        f"open files {'unlimited' if files == unlimited else files}, "
        f"address space {'unlimited' if space == unlimited else gib(space)}"
    )
    if space != unlimited:
        return Check(
            "limits",
            WARN,
            found,
            "Address space is not memory: jax and mapped files take far more of it than they use.",
            "ulimit -v unlimited",
        )
    if files != unlimited and files < _LEAST_FILES:
        return Check(
            "limits",
            WARN,
            found,
            "A checkpoint's files and a server's connections each take one.",
            f"ulimit -n {_LEAST_FILES} or more",
        )
    return Check("limits", OK, found)


def disk(cache_dir: str) -> Check:
    if not cache_dir:
        return Check(
            "disk",
            WARN,
            "compiled programs are not kept (cache_dir is empty)",
            "Every start compiles anew, from seconds to minutes.",
            "Set --cache_dir to a directory of your own.",
        )
    path = Path(cache_dir).expanduser()
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{path}: {gib(free)} free"
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        return Check(
            "disk",
            WARN,
            f"{path}: {place} cannot be written to",
            "Compiled programs cannot be kept: every start compiles anew.",
            "Set --cache_dir (JAXMOE_CACHE_DIR) to a directory of your own.",
        )
    if free < _LEAST_DISK:
        return Check(
            "disk",
            WARN,
            found,
            "Compiled programs of a large model may not fit; then every start compiles anew.",
            "Free some, or set --cache_dir (JAXMOE_CACHE_DIR) to another disk.",
        )
    return Check("disk", OK, found, "Compiled programs are kept there.")
