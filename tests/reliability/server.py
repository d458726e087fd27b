"""The server under test: a real jaxmoe_serve on the demo model, and what can be seen of it from
outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from reliability.client import get, metrics
from support.serve_process import ServeProcess, children, engine_pid, serve

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Server:
    """A running server. pid: the front's; engine_pid: of the engine there is now."""

    def __init__(self, process: ServeProcess) -> None:
        self.process = process
        self.url = process.url
        self.port = int(process.url.rsplit(":", 1)[1])
        self.pid = process.process.pid

    @property
    def engine_pid(self) -> int | None:
        return engine_pid(self.pid)

    @property
    def alive(self) -> bool:
        return self.process.process.poll() is None

    def metrics(self) -> dict[str, float]:
        return metrics(self.url)

    def rss_bytes(self) -> int:
        """Of the front and its children, shared memory counted in each."""
        return sum(rss_bytes(pid) for pid in (self.pid, *children(self.pid)))

    def status(self, path: str, timeout_s: float = 10.0) -> int:
        return get(self.url, path, timeout_s)[0]

    async def settle(self, timeout_s: float = 30.0) -> bool:
        """Whether nothing is in work any more, and every page is free, within that time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.is_idle(await asyncio.to_thread(self.metrics)):
                return True
            await asyncio.sleep(0.05)
        return False

    @staticmethod
    def is_idle(m: dict[str, float]) -> bool:
        busy = m["requests_running"] + m["requests_waiting"] + m["kv_pages_used"]
        return busy == 0 and m["http_requests_in_work"] == 0 and m["kv_pages_free"] == m["kv_pages"]


@contextlib.contextmanager
def running(*flags: str, within: Sequence[str] = (), **environment: str) -> Iterator[Server]:
    with serve(*flags, within=within, **environment) as process:
        yield Server(process)


def rss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return 0


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.01) -> float:
    """Seconds until the condition held; TimeoutError where it never did."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {condition.__name__}")
        time.sleep(every_s)
    return time.monotonic() - start
