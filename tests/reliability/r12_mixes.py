"""R12: greedy answers are the same alone and in any mix, after cancels, after a restart of the
engine, with the prefix cache and without.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

from reliability.client import COMPLETIONS, ask, encode, exchange
from reliability.figures import Check, Goal
from reliability.server import Server, running

_FLAGS = ("--quiet", "--max_num_seqs=4", "--page_size=4", "--prefill_chunk_tokens=32")
# A cache of few pages: mixes preempt each other and evict from the prefix cache.
_CACHE = "--kv_cache_gb=0.00025"
TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep."
)


def requests(count: int) -> list[dict[str, Any]]:
    """Beginnings of few texts, so that many begin alike."""
    rng = random.Random(12)
    out = []
    for number in range(count):
        text = TEXT[rng.choice([0, 27, 55]) :][: rng.randrange(8, 110)]
        out.append(
            {
                "prompt": text,
                "max_tokens": rng.randrange(2, 24),
                "temperature": rng.choice([0, 0, 0.9]),
                "seed": number,
                "ignore_eos": True,
                "return_token_ids": True,
                "logprobs": rng.choice([None, 1]),
            }
        )
    return out


def measure(count: int) -> list[Goal]:
    asked = requests(min(4 + count, 40))
    with running(*_FLAGS, "--noprefix_cache") as server:
        alone = asyncio.run(_alone(server, asked))
    rng = random.Random(count)
    wrong = compared = cancelled = restarts = 0
    with running(*_FLAGS, _CACHE, "--max_model_len=128") as server:
        restart_at = {count // 3, 2 * count // 3} if count > 3 else {1}
        for number in range(count):
            if number in restart_at:
                asyncio.run(_restart(server, asked))
                restarts += 1
            got = asyncio.run(_mix(server, rng, asked))
            compared += sum(a is not None for _, a in got)
            cancelled += sum(a is None for _, a in got)
            wrong += sum(a is not None and a != alone[i] for i, a in got)
        found = server.metrics()
        left = not asyncio.run(server.settle())
    hits = int(found["prefix_cache_hit_tokens_total"])
    preempted = int(found["preemptions_total"])
    return [
        Goal(
            "answers that differ from those given alone",
            "0",
            f"{wrong} of {compared} in {count} mixes, with {cancelled} cancelled beside them and "
            f"{restarts} restarts of the engine",
            wrong == 0 and compared > count,
        ),
        Goal(
            "what the mixes met since the last restart",
            "the prefix cache",
            f"{hits} tokens from the prefix cache, {preempted} preemptions",
            hits > 0,
        ),
        Goal("pages left", "none", "some" if left else "none", not left),
    ]


def _facts(answer: Any) -> Any:
    assert answer.status == 200, answer.body
    (choice,) = answer.json["choices"]
    return choice["token_ids"], choice["text"], choice["logprobs"], choice["finish_reason"]


async def _alone(server: Server, asked: list[dict[str, Any]]) -> list[Any]:
    return [_facts(await ask(server.port, COMPLETIONS, body)) for body in asked]


async def _mix(
    server: Server, rng: random.Random, asked: list[dict[str, Any]]
) -> list[tuple[int, Any]]:
    async def one(at: int, delay_s: float, leave_s: float | None) -> tuple[int, Any]:
        await asyncio.sleep(delay_s)
        if leave_s is None:
            return at, _facts(await ask(server.port, COMPLETIONS, asked[at]))
        task = asyncio.create_task(exchange(server.port, encode(COMPLETIONS, asked[at])))
        await asyncio.sleep(leave_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return at, None

    jobs = []
    for _ in range(rng.randrange(3, 10)):
        leave_s = rng.random() * 0.15 if rng.random() < 0.2 else None
        jobs.append(one(rng.randrange(len(asked)), rng.random() * 0.15, leave_s))
    return await asyncio.gather(*jobs)


async def _restart(server: Server, asked: list[dict[str, Any]]) -> None:
    """Kills the engine in the middle of a mix; those in flight get errors."""
    tasks = [asyncio.create_task(ask(server.port, COMPLETIONS, b)) for b in asked[:4]]
    await asyncio.sleep(0.05)
    pid = server.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(120):
        while server.engine_pid in (pid, None):
            await asyncio.sleep(0.05)
        while await asyncio.to_thread(server.status, "/ready") != 200:
            await asyncio.sleep(0.05)


CHECK = Check(
    "same answers in any mix", {"short": 6, "ci": 200, "release": 10_000}, "mixes", measure
)
