"""R3: clients that leave at a random byte of their request or of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

from reliability.client import CHAT, chat, encode, exchange, parse_metrics
from reliability.figures import Check, Goal, percentile
from reliability.server import Server, running

GRACE_S = 0.1


def measure(count: int) -> list[Goal]:
    with running("--quiet") as server:
        before = server.metrics()['requests_total{finish_reason="abort"}']
        waits, late, left = asyncio.run(_cancels(server, count))
        found = server.metrics()
        step_s = found["longest_step_seconds"]
        aborted = int(found['requests_total{finish_reason="abort"}'] - before)
    return [
        Goal(
            "slot and pages free again",
            f"within a step (at most {1e3 * step_s:.0f} ms, unless it compiles) + 100 ms",
            f"p50 {1e3 * percentile(waits, 0.5):.0f} ms, p99 {1e3 * percentile(waits, 0.99):.0f} "
            f"ms, longest {1e3 * max(waits):.0f} ms; {late} later than that",
            late == 0,
        ),
        Goal("pages or places leaked", "0", str(left), left == 0),
        Goal(
            "ends met by cancelling",
            "a third",
            f"{aborted} completions aborted, {count} cancels",
            aborted * 3 >= count,
        ),
    ]


async def _cancels(server: Server, count: int) -> tuple[list[float], int, int]:
    """Seconds until all was free, how many came too late, and what was never free."""
    rng, waits, late, left = random.Random(3), [], 0, 0
    compiled = 0.0
    poll = encode("/metrics")
    for number in range(count):
        body = chat(
            "word " * rng.randrange(1, 300),
            max_tokens=600,
            ignore_eos=True,
            stream=bool(rng.randrange(2)),
            n=rng.choice([1, 1, 3]),
        )
        data = encode(CHAT, body)
        sent = data if rng.random() < 0.8 else data[: rng.randrange(len(data))]
        wanted = rng.choice([0, 0, rng.randrange(1, 400), rng.randrange(1, 20_000)])
        r, w = await asyncio.open_connection("127.0.0.1", server.port)
        w.write(sent)
        got = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02 + rng.random() * 0.3):
                while got < wanted and (piece := await r.read(wanted - got)):
                    got += len(piece)
                if not wanted:
                    await asyncio.sleep(60)
        start = time.monotonic()
        w.transport.abort() if number % 2 else w.close()
        while True:
            now = parse_metrics((await exchange(server.port, poll)).body.decode())
            if server.is_idle(now):
                break
            if time.monotonic() - start > 60:
                left += 1
                break
        seconds = time.monotonic() - start
        waits.append(seconds)
        limit_s = now["longest_step_seconds"]
        if now["compiled_steps_total"] > compiled:
            limit_s = now["longest_step_with_compiling_seconds"]
        compiled = now["compiled_steps_total"]
        late += seconds > limit_s + GRACE_S
    return waits, late, left


CHECK = Check(
    "cancelled at a random byte", {"short": 30, "ci": 500, "release": 10_000}, "cancels", measure
)
