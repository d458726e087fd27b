"""A client that leaves ends its work, wherever that is: queued, in prefill, in decode."""

import asyncio
import contextlib
import random
import time

import httpx
import pytest
from support.front import run, serving

from jaxmoe.serving.replies import StreamReply, until_disconnect

CHAT = "/v1/chat/completions"


def ask(stream, text="hi", **more):
    return {"messages": [{"role": "user", "content": text}], "stream": stream, **more}


@contextlib.asynccontextmanager
async def client(f):
    async with httpx.AsyncClient(base_url=f.url, timeout=30) as c:
        yield c


async def leave(task):
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def wait_until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def slow_down(step):
    """Steps of a real engine's length: else hundreds are done before a busy client can leave."""
    run = step.run

    def slow(kind, rows, **more):
        time.sleep(0.02)
        return run(kind, rows, **more)

    step.run = slow


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_in_decode(path, stream):
    text = "x" * 5

    async def test():
        async with serving(lambda prompt: b"y" * 350) as f, client(f) as c:
            bodies = {
                CHAT: ask(stream),
                "/v1/completions": {"prompt": text, "stream": stream, "max_tokens": 300},
                "/v1/messages": ask(stream, max_tokens=300),
                "/v1/responses": {"input": text, "stream": stream},
            }
            slow_down(f.step)
            task = asyncio.create_task(c.post(path, json=bodies[path]))
            await wait_until(lambda: len(f.step.calls) > 3)
            await leave(task)
            await f.settle()
            assert len(f.step.calls) < 300  # long before it would have ended by itself
            assert f.engine.pages.num_free == f.engine.layout.num_pages

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_in_prefill_and_in_the_queue(stream):
    async def test():
        async with serving(engine={"max_num_seqs": 1}) as f, client(f) as c:
            f.gate.close()
            prefill = asyncio.create_task(c.post(CHAT, json=ask(stream, "p" * 200)))
            await wait_until(f.gate.waiting.is_set)
            queued = asyncio.create_task(c.post(CHAT, json=ask(stream, "q" * 200)))
            await wait_until(lambda: f.state.admission.requests == 2)
            await asyncio.sleep(0.1)
            await leave(queued)
            await leave(prefill)
            await wait_until(lambda: f.state.admission.requests == 0)
            f.gate.open()
            await f.settle()
            # 200 tokens are 13 chunks of 16; the one that was under way is the last.
            assert len(f.step.calls) <= 2

    run(test())


def test_many_prompts_end_together():
    async def test():
        async with serving(lambda prompt: b"y" * 300) as f, client(f) as c:
            body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 300, "stream": True}
            task = asyncio.create_task(c.post("/v1/completions", json=body))
            await wait_until(lambda: len(f.step.calls) > 5)
            await leave(task)
            await f.settle()
            assert f.engine.pages.num_free == f.engine.layout.num_pages

    run(test())


def test_at_random_moments_nothing_is_left_behind():
    rng = random.Random(5)

    async def one(f, number):
        async with client(f) as c:
            body = ask(bool(number % 2), "z" * rng.randrange(1, 60), n=1 + number % 3)
            task = asyncio.create_task(c.post(CHAT, json=body))
            await asyncio.sleep(rng.random() * 0.05)
            await leave(task)

    async def test():
        async with serving(lambda prompt: b"y" * 200, engine={"num_pages": 900}) as f:
            for _ in range(5):
                await asyncio.gather(*(one(f, n) for n in range(12)))
            await f.settle()
            assert f.state.admission.requests == 0
            assert f.engine.pages.num_free == f.engine.layout.num_pages
            r = await f.post(CHAT, ask(False, max_tokens=2))
            assert r.status_code == 200

    run(test())


@pytest.mark.parametrize("fails", [False, True])
def test_in_the_turn_in_which_the_handler_ends(fails):
    """The disconnect is read by then: no stream may be begun that waits for another."""
    ended = []

    async def events():
        try:
            yield b""
            yield b"more"
        finally:
            ended.append(True)

    async def test():
        made = events()
        await anext(made)

        async def work():
            if fails:
                raise ValueError("of no interest any more")
            return StreamReply(made)

        async def receive():
            return {"type": "http.disconnect"}

        assert await until_disconnect(receive, work()) is None
        assert bool(ended) != fails
        await made.aclose()

    run(test())
