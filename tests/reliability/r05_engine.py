"""R5: the engine process killed, crashed or stopped at random moments of its work."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

from reliability.client import CHAT, Answer, ask, chat, encode, exchange, get
from reliability.figures import Check, Goal
from reliability.server import Server, running

HANG_S = 3.0
_PATIENCE_S = 300.0  # above any watchdog's on a slow machine
_PER_SERVER = 3  # restarts in ten minutes after which a server gives up
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)


def measure(count: int) -> list[Goal]:
    rng = random.Random(5)
    found = _Found()
    number = 0
    while number < count:
        with running("--quiet", f"--hang_timeout_s={HANG_S:g}") as server:
            asyncio.run(_one(server, None, rng, found))
            asyncio.run(_warm_up(server))
            step_s = server.metrics()["longest_step_with_compiling_seconds"]
            limit_s = max(HANG_S, 10 * step_s) + 2.0
            for _ in range(min(_PER_SERVER, count - number)):
                how = SIGNALS[number % len(SIGNALS)] if count > 1 else signal.SIGKILL
                found.limit_s = max(found.limit_s, limit_s)
                asyncio.run(_one(server, how, rng, found))
                number += 1
            if not server.alive:
                found.recovered -= 1
    died, stopped = found.answers_s[False], found.answers_s[True]
    stop_words = f"; {max(stopped):.1f} s after SIGSTOP" if stopped else ""
    return [
        Goal(
            "requests in flight answered, every one",
            f"within 2 s, after SIGSTOP within the watchdog's {found.limit_s:.0f} s",
            f"{found.answered} of {found.in_flight}, the last after "
            f"{max(died, default=0.0):.2f} s{stop_words}",
            found.answered == found.in_flight
            and max(died, default=0.0) <= 2.0
            and max(stopped, default=0.0) <= found.limit_s,
        ),
        Goal(
            "/health says it (SIGSTOP: once it is noticed)",
            "within 1 s",
            f"{max(found.health_s):.2f} s",
            max(found.health_s) <= 1.0,
        ),
        Goal(
            "recovered, with the same answer as before",
            f"{count} of {count}",
            f"{found.recovered} of {count}, the slowest after {max(found.recovery_s):.1f} s",
            found.recovered == count,
        ),
    ]


class _Found:
    def __init__(self) -> None:
        self.in_flight = self.answered = self.recovered = 0
        self.answers_s: dict[bool, list[float]] = {False: [], True: []}  # by: stopped
        self.health_s: list[float] = []
        self.recovery_s: list[float] = []
        self.limit_s = 0.0
        self.said: bytes | None = None


async def _warm_up(server: Server) -> None:
    """Compiles what is met often; a signal may still come while something is compiled."""
    body = chat("word " * 30, max_tokens=30, ignore_eos=True)
    for count in (1, 4, 6):
        await asyncio.gather(*(ask(server.port, CHAT, body) for _ in range(count)))


async def _one(server: Server, how: int | None, rng: random.Random, found: _Found) -> None:
    """Some streams and whole answers in flight, then the signal; none: only the known answer."""
    if how is not None:
        bodies = [
            chat("word " * rng.randrange(1, 60), max_tokens=1500, ignore_eos=True, stream=i % 3 > 0)
            for i in range(rng.randrange(1, 7))
        ]
        tasks = [
            asyncio.create_task(exchange(server.port, encode(CHAT, b), _PATIENCE_S)) for b in bodies
        ]
        await asyncio.sleep(0.05 + rng.random() * 1.0)
        pid = server.engine_pid
        assert pid is not None
        in_flight = [t for t in tasks if not t.done()]
        start = time.monotonic()
        os.kill(pid, how)
        health = asyncio.create_task(asyncio.to_thread(_unhealthy_after, server, start))
        answers = await asyncio.gather(*in_flight, return_exceptions=True)
        answered_s = time.monotonic() - start
        found.in_flight += len(answers)
        found.answered += sum(isinstance(a, Answer) and _told_error(a) for a in answers)
        found.answers_s[how == signal.SIGSTOP].append(answered_s)
        noticed_s = await health
        found.health_s.append(
            max(noticed_s - answered_s, 0.0) if how == signal.SIGSTOP else noticed_s
        )
        while server.alive and time.monotonic() - start < 120:
            if await asyncio.to_thread(server.status, "/ready") == 200:
                break
            await asyncio.sleep(0.02)
        found.recovery_s.append(time.monotonic() - start)
    known = await ask(server.port, CHAT, chat("Who are you?", max_tokens=40))
    said = known.json["choices"][0]["message"]["content"].encode() if known.status == 200 else b""
    if found.said is None:
        found.said = said
    elif how is not None and said and said == found.said:
        found.recovered += 1


def _unhealthy_after(server: Server, start: float) -> float:
    while time.monotonic() - start < _PATIENCE_S:
        if get(server.url, "/health")[0] == 503:
            break
        time.sleep(0.005)
    return time.monotonic() - start


def _told_error(answer: Answer) -> bool:
    """Whether a client can tell what happened: an error, in a stream followed by its end."""
    if answer.status != 200:
        return answer.status in (500, 503) and b'"error"' in answer.body
    if answer.body.startswith((b"data:", b":")):
        return answer.has_end
    return True  # it was answered whole in that moment


CHECK = Check(
    "engine killed, crashed or stopped", {"short": 3, "ci": 30, "release": 1000}, "times", measure
)
