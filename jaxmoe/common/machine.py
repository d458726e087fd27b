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
