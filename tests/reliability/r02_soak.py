"""R2: hours of mixed load, a fifth of it cancelled and a twentieth nonsense.

Memory is judged by the slope through its readings after a warm-up, steps by how their 99th
percentile of ten seconds moves from the first third to the last (its median over the windows, for
other work on the machine comes in bursts).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from reliability.client import CHAT, COMPLETIONS, ask, chat, encode, exchange
from reliability.figures import Check, Goal, percentile
from reliability.server import PAGE_BYTES, Server, children, running

_CLIENTS = 6
_WINDOW_S = 10.0
_WARM_UP = 0.34  # of the time, at most ten minutes


def measure(seconds: int) -> list[Goal]:
    with running("--quiet") as server:
        before = asyncio.run(_baseline(server))
        log = asyncio.run(_soak(server, seconds))
        settled = asyncio.run(server.settle())
        time.sleep(6)  # idle connections close by themselves
        after = asyncio.run(_baseline(server))
        end = server.metrics()
    slope, spread = _slope(log.memory)
    drift = _drift(log.steps)
    done = {
        n: int(end.get(f'requests_total{{finish_reason="{n}"}}', 0))
        for n in ("stop", "length", "abort", "error")
    }
    return [
        Goal(
            "memory after warm-up",
            "grows by less than 1 MiB an hour",
            f"{slope:+.2f} MiB/h ({spread}); {sum(log.memory[-1][1:]) / 2**20:.0f} MiB",
            slope < 1.0,
        ),
        Goal(
            "files, threads, pages, places afterwards",
            "as before",
            f"{after[0] - before[0]:+d} files, {after[1] - before[1]:+d} threads, "
            + ("all pages free" if settled else "pages or places still taken"),
            after[0] <= before[0] and after[1] <= before[1] and settled,
        ),
        Goal(
            "99th percentile of a decode step",
            "moves by less than 5 %",
            f"{100 * drift:+.1f} % from the first third to the last",
            drift < 0.05,
        ),
        Goal(
            "answers",
            "none of them 500 or wrong",
            f"{log.answered:,} requests: {done['stop'] + done['length']:,} completions whole, "
            f"{done['abort']:,} cancelled, {log.refused:,} refused as nonsense, "
            f"{log.wrong.total()} wrong{''.join(f'; {n} x {w}' for w, n in log.wrong.items())}",
            not log.wrong and done["error"] == 0,
        ),
    ]


class _Log:
    def __init__(self) -> None:
        self.memory: list[tuple[float, int, int]] = []  # seconds, front's, engine's bytes
        self.steps: list[tuple[float, float]] = []  # seconds, a decode step's seconds
        self.answered = self.refused = 0
        self.wrong: Counter[str] = Counter()  # what was wrong, how often


async def _baseline(server: Server) -> tuple[int, int]:
    """Descriptors and threads of all its processes, once their pools of threads are as large as
    they get: those start threads as requests come at once, up to their limit, and keep them."""
    for body in (chat("hi", max_tokens=4), chat("hi", max_tokens=4, stream=True)):
        for _ in range(4):
            await asyncio.gather(*(ask(server.port, CHAT, body) for _ in range(4 * _CLIENTS)))
    await server.settle()
    await asyncio.sleep(0.5)
    files = threads = 0
    for pid in (server.pid, *children(server.pid)):
        files += len(os.listdir(f"/proc/{pid}/fd"))
        threads += len(os.listdir(f"/proc/{pid}/task"))
    return files, threads


async def _soak(server: Server, seconds: int) -> _Log:
    log, end = _Log(), time.monotonic() + seconds
    clients = [_client(server, random.Random(i), end, log) for i in range(_CLIENTS)]
    await asyncio.gather(_watch(server, end, log), *clients)
    return log


async def _watch(server: Server, end: float, log: _Log) -> None:
    start = time.monotonic()
    engine = server.engine_pid
    while time.monotonic() < end:
        found = await asyncio.to_thread(server.metrics)
        now = time.monotonic() - start
        log.steps.append((now, found["last_decode_step_seconds"]))
        if not log.memory or now - log.memory[-1][0] > 1.0:
            log.memory.append((now, _private_bytes(server.pid), _private_bytes(engine)))
        await asyncio.sleep(0.1)


def _private_bytes(pid: int | None) -> int:
    """Memory of its own: neither files nor shared."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * PAGE_BYTES
    return 0


async def _client(server: Server, rng: random.Random, end: float, log: _Log) -> None:
    known: dict[str, str] = {}
    while time.monotonic() < end:
        kind = rng.random()
        name = f"{rng.randrange(20)} " + "word " * rng.randrange(1, 80)
        body = chat(name, max_tokens=rng.randrange(1, 60), stream=rng.random() < 0.7)
        path = CHAT
        if kind < 0.05:
            body |= rng.choice([{"temperature": -1}, {"n": 0}, {"messages": 1}, {"stop": 5}])
        elif kind < 0.25:
            task = asyncio.create_task(exchange(server.port, encode(path, body)))
            await asyncio.sleep(rng.random() * 0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            log.answered += 1
            continue
        elif kind < 0.5:
            # One of few requests: its answer is the same for ever.
            name = f"verse {rng.randrange(5)}"
            path, body = COMPLETIONS, {"prompt": name, "max_tokens": 20, "temperature": 0}
        try:
            answer = await exchange(server.port, encode(path, body))
        except (OSError, TimeoutError) as e:
            log.wrong[type(e).__name__] += 1
            continue
        log.answered += 1
        if kind < 0.05 and answer.status == 400:
            log.refused += 1
        elif answer.status != (400 if kind < 0.05 else 200):
            log.wrong[f"status {answer.status}"] += 1
        elif path == CHAT and body["stream"] and not answer.has_end:
            log.wrong["stream without its end"] += 1
        elif path == COMPLETIONS:
            text = answer.json["choices"][0]["text"]
            if (first := known.setdefault(name, text)) != text:
                log.wrong[f"{text!r} instead of {first!r}"] += 1


def _slope(memory: list[tuple[float, int, int]]) -> tuple[float, str]:
    """MiB an hour through the readings after the warm-up (Theil and Sen's), and of whom."""
    begin = min(_WARM_UP * memory[-1][0], 600.0)
    kept = [m for m in memory if m[0] >= begin]
    kept = kept[:: max(len(kept) // 400, 1)]
    slopes = []
    for who in (1, 2):
        found = [
            (b[who] - a[who]) / (b[0] - a[0])
            for i, a in enumerate(kept)
            for b in kept[i + max(len(kept) // 4, 1) :]
        ]
        slopes.append(statistics.median(found) * 3600 / 2**20 if found else 0.0)
    return sum(slopes), f"front {slopes[0]:+.2f}, engine {slopes[1]:+.2f}"


def _drift(steps: list[tuple[float, float]]) -> float:
    windows: dict[int, list[float]] = {}
    for at, seconds in steps:
        windows.setdefault(int(at / _WINDOW_S), []).append(seconds)
    highs = [percentile(w, 0.99) for _, w in sorted(windows.items())]
    third = max(len(highs) // 3, 1)
    return statistics.median(highs[-third:]) / statistics.median(highs[:third]) - 1


CHECK = Check("soak", {"short": 45, "ci": 900, "release": 72 * 3600}, "s of mixed load", measure)
