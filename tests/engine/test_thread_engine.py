"""The engine in a thread, seen from an event loop: order, cancelling, refusals, the end."""

import asyncio
import contextlib
import gc
import threading

import pytest
from support import fake_step

from jaxmoe.common.errors import CapacityError, EngineDeadError, RequestError
from jaxmoe.engine.admission import QueueBounds
from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.engine.driver import Driver
from jaxmoe.engine.messages import AbortRequest, AddRequest, Stop
from jaxmoe.engine.ready import Ready
from jaxmoe.engine.thread_engine import ThreadEngine
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.structured_output import StructuredOutput

GREEDY = SamplingParams(temperature=0)
LONG = b"0123456789" * 3


class Gate:
    """Lets the engine's thread take a step at a time."""

    def __init__(self, step):
        self.open = threading.Event()
        self.open.set()
        self.allowed = threading.Semaphore(0)
        run = step.run

        def gated(kind, rows, **more):
            while not self.open.is_set():
                if self.allowed.acquire(timeout=0.01):
                    break
            return run(kind, rows, **more)

        step.run = gated


@contextlib.asynccontextmanager
async def serving(bounds=None, script=lambda prompt: LONG, hold_s=0.0, **more):
    engine, step = fake_step.make_engine(script, **more)
    front = ThreadEngine.on_engine(engine, model="fake", bounds=bounds, hold_s=hold_s)
    await front.wait_ready()
    front.engine, front.step, front.gate = engine, step, Gate(step)
    yield front
    front.gate.open.set()
    await front.close()
    assert not engine.has_work and engine.pages.num_free == engine.layout.num_pages
    engine.pages.check()


async def collect(stream):
    items = [item async for item in stream]
    deltas = [i for i in items if isinstance(i, Delta)]
    return "".join(d.text for d in deltas), deltas[-1], items


async def settle(front):
    """Until the engine's thread has nothing left to do."""
    for _ in range(1000):
        if not front.engine.has_work:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the work never ends")


def run(test):
    asyncio.run(asyncio.wait_for(test, 30))


def test_deltas_come_in_order_and_the_last_carries_the_output():
    async def test():
        async with serving() as front:
            assert front.info.model == "fake" and front.info.max_model_len == 40
            stream = front.generate("a", list(b"count"), GREEDY)
            text, last, items = await collect(stream)
            assert text == LONG.decode() == last.output.text
            assert last.finish_reason == "stop" and last.output.prompt_token_ids == tuple(b"count")
            assert items[0] == PrefillProgress("a", 5, 5)
            assert [i async for i in stream] == []

    run(test())


def test_many_at_once_do_not_mix():
    async def test():
        async with serving(script=lambda prompt: prompt * 3) as front:
            prompts = [b"%d" % i for i in range(40)]
            streams = [front.generate(p.decode(), list(p), GREEDY) for p in prompts]
            for prompt, (text, _, _) in zip(
                prompts, await asyncio.gather(*map(collect, streams)), strict=True
            ):
                assert text == prompt.decode() * 3

    run(test())


@pytest.mark.parametrize("ids", [[], [256], [1] * 40])
def test_bad_requests_are_refused_at_once(ids):
    async def test():
        async with serving() as front:
            with pytest.raises(RequestError):
                front.generate("a", ids, GREEDY)
            with pytest.raises(RequestError, match="stop_token_ids"):
                front.generate("a", [1], SamplingParams(stop_token_ids=[999]))

    run(test())


@pytest.mark.parametrize(
    "bounds,prompts,words",
    [
        (QueueBounds(max_requests=3), [1, 1, 1, 1], "3 requests wait.*max_queued_requests"),
        (QueueBounds(max_tokens=9), [5, 4, 1], "9 prompt tokens wait.*brings 1.*max_queued_tokens"),
    ],
)
def test_a_full_queue_refuses_and_takes_again_later(bounds, prompts, words):
    async def test():
        async with serving(bounds) as front:
            front.gate.open.clear()
            *fit, last = prompts
            streams = [front.generate(str(i), [7] * n, GREEDY) for i, n in enumerate(fit)]
            with pytest.raises(CapacityError, match=words):
                front.generate("x", [7] * last, GREEDY)
            await streams.pop().aclose()
            front.generate("y", [7], GREEDY)
            front.gate.open.set()
            for stream in streams:
                assert (await collect(stream))[0] == LONG.decode()

    run(test())


def test_an_id_in_use_is_refused_and_free_again_afterwards():
    async def test():
        async with serving() as front:
            stream = front.generate("a", [7], GREEDY)
            with pytest.raises(RequestError, match="'a' is in use"):
                front.generate("a", [7], GREEDY)
            await collect(stream)
            await collect(front.generate("a", [7], GREEDY))

    run(test())


@pytest.mark.parametrize("how", ["aclose", "cancel", "drop"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_leaving_early_ends_the_request(how, after):
    async def test():
        async with serving(max_num_seqs=1) as front:
            stream = front.generate("a", [7], SamplingParams(ignore_eos=True))
            queued = front.generate("b", [7], GREEDY)
            front.gate.open.clear() if after == 0 else None
            for _ in range(after):
                await anext(stream)
            if how == "aclose":
                await stream.aclose()
            elif how == "cancel":
                task = asyncio.create_task(collect(stream))
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            del stream
            gc.collect()
            front.gate.open.set()
            assert (await collect(queued))[0] == LONG.decode()
            await settle(front)

    run(test())


def test_abort_gives_what_was_written_with_its_reason():
    async def test():
        async with serving(max_num_seqs=1) as front:
            params = SamplingParams(ignore_eos=True, n=2, stop="89z")
            front.gate.open.clear()
            stream = front.generate("a", [7], params)
            queued = front.generate("b", [7], GREEDY)
            front.gate.allowed.release(4)
            await anext(stream)
            await front.abort("b")
            await front.abort("a")
            await front.abort("never heard of")
            front.gate.open.set()
            _, last, _ = await collect(stream)
            assert [c.finish_reason for c in last.output.outputs] == ["abort", "abort"]
            first = last.output.outputs[0]
            assert LONG.decode().startswith(first.text) and len(first.text) == len(first.token_ids)
            text, last, items = await collect(queued)
            assert (text, last.output.outputs[0].finish_reason, len(items)) == ("", "abort", 1)

    run(test())


def test_a_slow_reader_gets_larger_pieces():
    async def test():
        text = b"0123456789" * 20
        async with serving(script=lambda p: text, max_model_len=300, num_pages=80) as front:
            stream = front.generate("a", [7], SamplingParams(temperature=0, logprobs=1))
            await anext(stream)
            await settle(front)
            await asyncio.sleep(0.05)
            assert len(stream._items) < 40
            got, last, items = await collect(stream)
            assert got == text.decode() and last.output.text == got
            assert tuple(t for d in items for t in d.token_ids) == last.output.outputs[0].token_ids
            entries = tuple(e for d in items for e in d.logprobs)
            assert entries == last.output.outputs[0].logprobs

    run(test())


def test_a_slow_reader_of_several_completions_gets_larger_pieces():
    async def test():
        text = b"0123456789" * 20
        async with serving(script=lambda p: text, max_model_len=300, num_pages=400) as front:
            stream = front.generate("a", [7], SamplingParams(temperature=0, n=4))
            await anext(stream)
            await settle(front)
            await asyncio.sleep(0.05)
            assert len(stream._items) < 60  # of 800 tokens
            items = [item async for item in stream]
            for i in range(4):
                got = "".join(d.text for d in items if isinstance(d, Delta) and d.index == i)
                assert text.decode().endswith(got) and len(got) > 190
            last = items[-1]
            assert [c.text for c in last.output.outputs] == [text.decode()] * 4

    run(test())


def test_short_steps_share_a_message_and_long_ones_do_not():
    async def test():
        async with serving(script=lambda p: LONG, hold_s=10.0) as front:
            text, last, items = await collect(front.generate("a", [7], GREEDY))
            assert text == LONG.decode() and last.output.text == text
            # The first token at once, the rest when the last one came.
            deltas = [i for i in items if isinstance(i, Delta)]
            assert [len(d.token_ids) for d in deltas] == [1, len(LONG)]
            # A chunk of another prompt does not hold them back either.
            front.gate.open.clear()
            stream = front.generate("b", [7], GREEDY)
            front.gate.allowed.release(3)
            assert (await anext(stream)).computed_tokens == 1
            assert (await anext(stream)).text == "0"
            other = front.generate("c", [8], GREEDY)
            front.gate.allowed.release(1)
            assert (await anext(stream)).text.startswith("1")
            front.gate.open.set()
            await collect(stream)
            await collect(other)

    run(test())


def test_a_hard_grammar_holds_up_nobody_else():
    async def test():
        async with serving() as front:
            begun, go, prepare = threading.Event(), threading.Event(), front.engine.prepare

            def slow(params):
                if params.structured is not None:
                    begun.set()
                    assert go.wait(20)
                prepare(params)

            front.engine.prepare = slow
            grammar = SamplingParams(temperature=0, structured=StructuredOutput.regex("[0-9]*"))
            streams = [front.generate(i, [7], grammar) for i in ("kept", "aborted", "left")]
            await asyncio.to_thread(begun.wait)
            assert (await collect(front.generate("plain", [7], GREEDY)))[0] == LONG.decode()
            await front.abort("aborted")
            await streams.pop().aclose()
            front.engine.prepare = prepare
            go.set()
            await collect(streams[0])
            _, last, _ = await collect(streams[1])
            assert last.output.outputs[0].finish_reason == "abort"
            bad = SamplingParams(structured=StructuredOutput.regex("("))
            with pytest.raises(RequestError):
                await collect(front.generate("bad", [7], bad))
            await settle(front)

    run(test())


def test_grammars_of_aborted_requests_are_not_compiled():
    async def test():
        async with serving() as front:
            busy, go, prepare = threading.Semaphore(0), threading.Event(), front.engine.prepare
            compiled = []

            def slow(params):
                if (
                    params.structured is not None
                    and threading.current_thread() is not front._thread
                ):
                    compiled.append(params)
                    busy.release()
                    assert go.wait(20)
                prepare(params)

            front.engine.prepare = slow
            grammar = SamplingParams(temperature=0, structured=StructuredOutput.regex("[0-9]*"))
            streams = [front.generate(f"s{i}", [7], grammar) for i in range(8)]
            for _ in range(2):
                await asyncio.to_thread(busy.acquire)
            for i in range(1, 8):
                await front.abort(f"s{i}")
            # They are answered while the compilers are still at it, and their ids are free again.
            for stream in streams[1:]:
                _, last, _ = await collect(stream)
                assert last.output.outputs[0].finish_reason == "abort"
                assert last.output.prompt_token_ids == (7,)
            again = front.generate("s1", [7], grammar)
            go.set()
            assert (await collect(streams[0]))[0] == LONG.decode()
            assert (await collect(again))[0] == LONG.decode()
            assert len(compiled) == 3
            await settle(front)

    run(test())


def test_commands_after_the_end_are_dropped():
    engine, _ = fake_step.make_engine(lambda prompt: LONG)
    driver = Driver(engine, lambda events: None)
    driver.post(Stop())
    driver.run()
    grammar = SamplingParams(structured=StructuredOutput.regex("[0-9]*"))
    for params in (GREEDY, grammar):
        driver.post(AddRequest("late", (7,), params))
    driver.post(AbortRequest("late"))
    assert not engine.has_work


def test_a_failed_step_ends_every_request_and_later_ones():
    async def test():
        engine, step = fake_step.make_engine(lambda prompt: LONG)
        front = ThreadEngine.on_engine(engine)
        await front.wait_ready()
        gate = Gate(step)
        gate.open.clear()
        streams = [front.generate(str(i), [7], GREEDY) for i in range(6)]
        step.fail_with = ValueError("boom")
        gate.open.set()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="ValueError: boom"):
                await collect(stream)
        assert front.status().state == "dead" and "boom" in front.status().error
        with pytest.raises(EngineDeadError, match="boom"):
            front.generate("x", [7], GREEDY)
        await front.close()

    run(test())


def test_loading_is_reported_and_refuses_until_it_is_done():
    async def test():
        reported, go = threading.Event(), threading.Event()

        def make(on_stage):
            on_stage("loading weights", 40.0)
            reported.set()
            assert go.wait(10)
            engine, _ = fake_step.make_engine(lambda prompt: b"x")
            return Ready(engine, engine.info("fake"))

        front = ThreadEngine(make)
        await asyncio.to_thread(reported.wait)
        status = front.status()
        assert (status.state, status.stage, status.percent) == ("loading", "loading weights", 40.0)
        for use in (lambda: front.info, lambda: front.generate("a", [7], GREEDY)):
            with pytest.raises(CapacityError, match=r"is loading \(loading weights\)"):
                use()
        go.set()
        await front.wait_ready()
        assert (await collect(front.generate("a", [7], GREEDY)))[0] == "x"
        await front.close()

    run(test())


def test_a_close_at_the_end_of_loading_ends():
    async def test():
        loaded, go = threading.Event(), threading.Event()
        engine, _ = fake_step.make_engine(lambda prompt: b"x")
        stats = engine.stats

        def slow_stats():  # the last thing before requests are taken
            loaded.set()
            assert go.wait(20)
            return stats()

        engine.stats = slow_stats
        front = ThreadEngine.on_engine(engine)
        await asyncio.to_thread(loaded.wait)
        closing = asyncio.create_task(front.close())
        await asyncio.sleep(0.05)
        go.set()
        await asyncio.to_thread(front._thread.join, 10)
        assert not front._thread.is_alive()
        await closing
        assert front.status().state == "dead"

    run(test())


def test_an_engine_that_does_not_load_is_dead_with_the_reason():
    async def test():
        def make(on_stage):
            raise CapacityError("no memory")

        front = ThreadEngine(make)
        with pytest.raises(EngineDeadError, match="CapacityError: no memory"):
            await front.wait_ready()
        await front.close()

    run(test())


@pytest.mark.parametrize("drain_s,reason", [(20.0, "stop"), (0.0, "abort")])
def test_close_drains_or_aborts(drain_s, reason):
    async def test():
        async with serving() as front:
            front.gate.open.clear()
            streams = [front.generate(str(i), [7], GREEDY) for i in range(6)]
            tasks = [asyncio.create_task(collect(s)) for s in streams]
            closing = asyncio.create_task(front.close(drain_s))
            await asyncio.sleep(0.01)
            status = front.status()
            assert status.state == "draining"
            assert drain_s == 0.0 or status.stage == "6 requests left"
            with pytest.raises(CapacityError, match="draining"):
                front.generate("x", [7], GREEDY)
            front.gate.open.set()
            for _, last, _ in await asyncio.gather(*tasks):
                assert last.output.outputs[0].finish_reason == reason
            await closing
            assert front.status().state == "dead"
            with pytest.raises(EngineDeadError, match="closed"):
                front.generate("x", [7], GREEDY)

    run(test())
