"""The load of a test: which prompts, and when each is sent.

Open loop: requests come at a rate, at random (Poisson) moments, whether or not earlier ones are
answered. Closed loop: as many are in flight as `concurrency` says. Both together: a rate, but never
more in flight than that; a request that has to wait is timed from when it was due.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.cli.bench_client import Timed
from jaxmoe.common.errors import ConfigError

# Common words, one token each for most tokenizers with the space before them.
_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who will "
    "no more if out so up said what its about than into them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after also "
    "well back"
).split()


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a sweep. rate: requests per second, inf for all at once. concurrency: most
    requests in flight, None for any number.
    """

    rate: float = math.inf
    concurrency: int | None = None

    def describe(self) -> str:
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"
        if self.concurrency is None:
            return rate
        return f"{self.concurrency} in flight" + ("" if math.isinf(self.rate) else f", {rate}")


def made_up_prompts(count: int, tokens: int, seed: int) -> list[str]:
    """Different texts of about `tokens` tokens each: no two share a beginning that a prefix cache
    could find.
    """
    rng = random.Random(seed)
    return [
        " ".join([str(rng.randrange(10**6)), *rng.choices(_WORDS, k=max(tokens - 3, 1))])
        for _ in range(count)
    ]


def read_prompts(path: Path, count: int) -> list[Any]:
    """The first `count` prompts of a JSONL file, from the start again if there are fewer: texts,
    or lists of messages. Lines are {"prompt": ...}, {"messages": ...} or OpenAI batch lines.
    """
    prompts: list[Any] = []
    try:
        with path.open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip() and len(prompts) < count:
                    prompts.append(_prompt(path, number, line))
    except OSError as e:
        raise ConfigError(f"--prompts: {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"--prompts: {path}: not UTF-8: {e}") from None
    if not prompts:
        raise ConfigError(f"--prompts: {path} has no line")
    return [prompts[i % len(prompts)] for i in range(count)]


def _prompt(path: Path, number: int, line: str) -> Any:
    try:
        value = json.loads(line)
        value = value.get("body", value)
        prompt = value["messages"] if "messages" in value else value["prompt"]
    except (ValueError, KeyError, AttributeError):
        prompt = None
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ConfigError(
            f'--prompts: {path} line {number}: wanted {{"prompt": TEXT}} or {{"messages": [...]}}'
        )
    return prompt


def bodies(
    prompts: Sequence[Any], endpoint: str, model: str, common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Request bodies: texts become a user's message for "chat"; messages need "chat"."""
    out = []
    for prompt in prompts:
        body = {"model": model, **common}
        if endpoint == "chat":
            is_text = isinstance(prompt, str)
            body["messages"] = [{"role": "user", "content": prompt}] if is_text else prompt
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            raise ConfigError("--prompts: has messages; wanted --endpoint=chat for them")
        else:
            body["prompt"] = prompt
        out.append(body)
    return out


def due_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are due."""
    if math.isinf(rate):
        return [0.0] * count
    rng, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(rate)
    return times


async def run_load(
    send: Callable[[dict[str, Any], float], Awaitable[Timed]],
    requests: Sequence[dict[str, Any]],
    point: Point,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> tuple[list[Timed], float]:
    """Sends all requests; what became of each, in their order, and the seconds it took."""
    start = time.perf_counter()
    due = due_times(len(requests), point.rate, seed)
    closed = math.isinf(point.rate)
    turns = asyncio.Semaphore(point.concurrency or len(requests))

    async def one(body: dict[str, Any], at: float) -> Timed:
        await asyncio.sleep(start + at - time.perf_counter())
        async with turns:
            # In a closed loop a request is due when its turn comes.
            timed = await send(body, time.perf_counter() if closed else start + at)
        done()
        return timed

    tasks = [asyncio.ensure_future(one(b, t)) for b, t in zip(requests, due, strict=True)]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return list(results), time.perf_counter() - start
