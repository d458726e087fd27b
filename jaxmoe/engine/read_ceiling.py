"""What the engine's threads read from memory when they only read: the bound of decoding, for the
share of it that /metrics shows. Measured once, when a server's engine starts.

What it does not do: figures to quote (jaxmoe_doctor --bandwidth and jaxmoe_bench measure
longer, in the same minute as what they are compared with).
"""

from __future__ import annotations

from pathlib import Path

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.weights import memory

_CACHES = Path("/sys/devices/system/cpu")
_LEAST_BYTES, _MOST_BYTES = 256 << 20, 4 << 30
_BEYOND_CACHE = 4  # times the last-level caches: what they hold of a buffer then is little
_REPEATS = 3  # 0.1 s on two threads, a second on a large machine


def measure(runtime: CpuRuntime) -> float:
    """Bytes per second, the best of some passes; 0 where there is no memory to spare for it."""
    size = min(max(_BEYOND_CACHE * last_level_bytes(), _LEAST_BYTES), _MOST_BYTES)
    if memory.available_bytes() < 4 * size:
        return 0.0
    return max(runtime.read_bandwidth(size, _REPEATS))


def last_level_bytes(root: Path = _CACHES) -> int:
    """Of all last-level caches of the machine together; 0 where the system does not tell."""
    found: dict[str, int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index3"):
        try:
            shared = (folder / "shared_cpu_list").read_text().strip()
            size = (folder / "size").read_text().strip()
        except OSError:
            continue
        if size.endswith("K") and size[:-1].isdigit():
            found[shared] = int(size[:-1]) << 10
    return sum(found.values())
