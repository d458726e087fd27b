"""R4: ten times the requests that can be served.

The bound of the time to the first token follows from the queue: whoever is let in has at most so
many before it, and they go at the speed measured just before.
"""

from __future__ import annotations

import asyncio
import random
import time

from reliability.client import CHAT, Answer, Pool, ask, chat
from reliability.figures import Check, Goal, percentile
from reliability.server import Server, running

SEQS, QUEUED, TOKENS = 4, 8, 24
_TIMES = 10
_CALIBRATE_S = 4.0


def measure(seconds: int) -> list[Goal]:
    with running("--quiet", f"--max_num_seqs={SEQS}", f"--max_queued_requests={QUEUED}") as server:
        rate, alone_s = asyncio.run(_capacity(server))
        quiet_bytes = server.rss_bytes()
        accepted, refused_s, other, most_bytes = asyncio.run(
            _overload(server, rate * _TIMES, seconds)
        )
        back_s = asyncio.run(_back_to_normal(server, alone_s))
    # A place in the queue, the ones running, and its own first token.
    bound_s = (QUEUED + SEQS) / rate + alone_s
    p99 = percentile(accepted, 0.99)
    refused_p99 = percentile(refused_s, 0.99)
    grown = (most_bytes - quiet_bytes) / 2**20
    return [
        Goal(
            "time to the first token of those let in, p99",
            f"at most 1.5 x the queue's bound of {bound_s:.2f} s",
            f"{p99:.2f} s = {p99 / bound_s:.2f} x, of {len(accepted)}",
            bool(accepted) and p99 <= 1.5 * bound_s,
        ),
        Goal(
            "the others refused with 429 and Retry-After",
            "within 50 ms (p99)",
            f"{len(refused_s)} refused, p50 {1e3 * percentile(refused_s, 0.5):.0f} ms, p99 "
            f"{1e3 * refused_p99:.0f} ms; {other} ended otherwise",
            bool(refused_s) and refused_p99 <= 0.05 and other == 0,
        ),
        Goal("memory", "bounded (64 MiB more)", f"{grown:+.0f} MiB", grown < 64),
        Goal("as fast as before", "within 10 s", f"after {back_s:.1f} s", back_s <= 10.0),
    ]


def _body(number: int, **more) -> dict:
    # No two begin alike, or the prefix cache would make the overload lighter than the calibration.
    return chat(f"{number} and it came to pass", max_tokens=TOKENS, ignore_eos=True, **more)


async def _capacity(server: Server) -> tuple[float, float]:
    """Requests a second with all places taken, and the time to the first token of one alone."""
    await asyncio.gather(*(ask(server.port, CHAT, _body(-i)) for i in range(SEQS)))
    alone = [(await ask(server.port, CHAT, _body(i, stream=True))).first_s for i in range(5)]
    done, end = 0, time.monotonic() + _CALIBRATE_S

    async def client(at: int) -> None:
        nonlocal done
        while time.monotonic() < end:
            await ask(server.port, CHAT, _body(1000 * at + done, stream=True))
            done += 1

    start = time.monotonic()
    await asyncio.gather(*(client(i) for i in range(1, SEQS + 1)))
    return done / (time.monotonic() - start), percentile(alone, 0.5)


async def _overload(
    server: Server, rate: float, seconds: int
) -> tuple[list[float], list[float], int, int]:
    rng = random.Random(4)
    tasks, most, pool = [], 0, Pool(server.port)
    start = time.monotonic()
    due = start
    while due < start + seconds:
        await asyncio.sleep(max(due - time.monotonic(), 0))
        body = _body(10**6 + len(tasks), stream=bool(len(tasks) % 4))
        tasks.append(asyncio.create_task(pool.ask(CHAT, body)))
        due += rng.expovariate(rate)
        if len(tasks) % 50 == 0:
            most = max(most, server.rss_bytes())
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    pool.close()
    accepted, refused, other = [], [], 0
    for a in answers:
        if not isinstance(a, Answer):
            other += 1
        elif a.status == 429:
            refused.append(a.whole_s)
        elif a.status == 200:
            if a.body.startswith((b"data:", b":")):
                accepted.append(a.first_s)
        else:
            other += 1
    return accepted, refused, other, max(most, server.rss_bytes())


async def _back_to_normal(server: Server, alone_s: float) -> float:
    """Until one alone is answered as fast as before (half as long again, for the noise)."""
    start = time.monotonic()
    while time.monotonic() - start < 60:
        answer = await ask(server.port, CHAT, _body(-1000, stream=True))
        if answer.status == 200 and answer.first_s <= 1.5 * alone_s + 0.05:
            break
    return time.monotonic() - start


CHECK = Check("ten times overload", {"short": 4, "ci": 30, "release": 300}, "s", measure)
