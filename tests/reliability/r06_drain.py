"""R6: SIGTERM while streams and whole answers are in flight."""

from __future__ import annotations

import asyncio
import random
import time

from reliability.client import CHAT, Answer, ask, chat
from reliability.figures import Check, Goal
from reliability.server import children, running

DRAIN_S = 2.0


def measure(count: int) -> list[Goal]:
    rng = random.Random(6)
    truncated = total = refused = left = 0
    codes, seconds = [], []
    for _ in range(count):
        with running("--quiet", f"--drain_timeout_s={DRAIN_S:g}") as server:
            answers, took_s = asyncio.run(_drain(server, rng))
            code = server.process.wait(30)
            seconds.append(took_s())
            codes.append(code)
            left += len(children(server.pid))
        for a in answers:
            total += 1
            if not isinstance(a, Answer):
                truncated += 1
            elif a.status != 200:
                refused += a.status == 503
                truncated += a.status != 503
            elif a.body.startswith((b"data:", b":")):
                truncated += not a.has_end
            else:
                truncated += not a.json["choices"][0]["finish_reason"]
    limit = DRAIN_S + 2.0
    return [
        Goal(
            "answers cut without finish or error",
            "0",
            f"{truncated} of {total} ({refused} of them refused with 503)",
            truncated == 0,
        ),
        Goal(
            "exit code and time",
            f"0 within the drain's {DRAIN_S:g} s + 2 s",
            f"{'0' if not any(codes) else codes} within {max(seconds):.2f} s",
            not any(codes) and max(seconds) <= limit,
        ),
        Goal("processes left", "0", str(left), left == 0),
    ]


async def _drain(server, rng):
    """Answers of what was in flight, and a clock from the signal on."""

    def body() -> dict:
        return chat(
            "word " * rng.randrange(1, 100),
            max_tokens=rng.choice([20, 200, 1500]),
            ignore_eos=True,
            stream=rng.random() < 0.7,
        )

    tasks = [
        asyncio.create_task(ask(server.port, CHAT, body())) for _ in range(rng.randrange(2, 9))
    ]
    await asyncio.sleep(rng.random() * 1.5)
    start = time.monotonic()
    server.process.terminate()
    await asyncio.sleep(rng.random() * 0.2)
    tasks.append(asyncio.create_task(ask(server.port, CHAT, body())))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    # A connection refused is an answer too: the server has stopped listening.
    answers = [a for a in answers if not isinstance(a, ConnectionRefusedError)]
    return answers, lambda: time.monotonic() - start


CHECK = Check("SIGTERM under load", {"short": 1, "ci": 20, "release": 200}, "times", measure)
