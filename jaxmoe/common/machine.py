"""What the machine's CPU is called. `root` stands before the path read, for tests."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name(root: Path = Path("/")) -> str:
    """As the kernel names it, or the architecture where it does not."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_id(root: Path = Path("/")) -> str:
    """Vendor, family, model and stepping: what virtual machines keep where the name says little."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    wanted = ("vendor_id", "cpu family", "model", "stepping")
    return " ".join(facts[name] for name in wanted if name in facts)


def memory_topology(root: Path = Path("/")) -> str:
    """Every NUMA node's CPUs and memory, rounded to GiB: what memory bandwidth depends on."""
    found = []
    for folder in sorted(root.glob("sys/devices/system/node/node[0-9]*"), key=_node_number):
        try:
            cpus = (folder / "cpulist").read_text().strip()
            total = (folder / "meminfo").read_text().partition("MemTotal:")[2].split()
            found.append(f"{folder.name}: CPUs {cpus}, {round(int(total[0]) / 2**20)} GiB")
        except (OSError, ValueError, IndexError):
            continue
    return "; ".join(found)


def _node_number(folder: Path) -> int:
    return int(folder.name.removeprefix("node"))
