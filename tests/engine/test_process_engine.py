"""The engine process as the front sees it: the same texts, and every way for it to end."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import fake_engine_child

from jaxmoe.common.errors import CapacityError, EngineDeadError, RequestError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.engine.process_engine import ProcessEngine, Supervision
from jaxmoe.engine.watchdog import Patience
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.weights import shared_store

GREEDY = SamplingParams(temperature=0)
TEXT = fake_engine_child.TEXT.decode()
QUICK = Supervision(
    patience=Patience(least_s=1.0, factor=1.0), check_s=0.1, pauses_s=(0.0,), max_restarts=10
)


def run(test):
    asyncio.run(asyncio.wait_for(test, 120))


@contextlib.asynccontextmanager
async def serving(supervision=QUICK, **options):
    config = EngineConfig(model="fake", **options)
    front = ProcessEngine(config, supervision, fake_engine_child.COMMAND)
    try:
        await front.wait_ready()
        yield front
    finally:
        pid = front.pid
        await front.close()
    assert front.pid is None
    if pid is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def collect(stream):
    items = [item async for item in stream]
    deltas = [i for i in items if isinstance(i, Delta)]
    return "".join(d.text for d in deltas), deltas[-1], items


def test_requests_stats_and_refusals():
    async def test():
        async with serving() as front:
            assert (front.info.model, front.info.report) == ("fake", "a report")
            streams = [
                front.generate(str(i), [7, i], SamplingParams(logprobs=2, n=2, seed=2**64 - 1))
                for i in range(10)
            ]
            for i, stream in enumerate(streams):
                _, last, items = await collect(stream)
                assert items[0] == PrefillProgress(str(i), 2, 2)
                assert [c.text for c in last.output.outputs] == [TEXT, TEXT]
                assert last.output.prompt_token_ids == (7, i)
                assert last.logprobs[-1].top == ((1, -0.5), (7, -1.0))
                assert last.output.outputs[0].timings.output_tokens == 31
            stats = front.stats()
            assert stats["generation_tokens_total"] == 20 * 31
            assert stats["requests_running"] == stats["kv_pages_used"] == 0
            assert stats["engine_restarts_total"] == 0
            for ids, params, salt in (
                ([], GREEDY, None),
                ([256], GREEDY, None),
                ([1], SamplingParams(max_tokens=99), None),
                ([1], GREEDY, "x" * 300),
                ([1], GREEDY, "\ud800"),
            ):
                with pytest.raises(RequestError):
                    front.generate("x", ids, params, cache_salt=salt)
            entries = SamplingParams(temperature=0, prompt_logprobs=1)
            _, last, items = await collect(front.generate("p", [7, 8], entries))
            given = next(i for i in items if isinstance(i, Delta)).prompt_logprobs
            assert len(given) == 2 and last.output.prompt_logprobs == given
            # What no message holds is refused, and the engine lives on.
            with pytest.raises(RequestError, match="answer is too large.*wanted at most"):
                await collect(front.generate("e", list(b"large"), SamplingParams(logprobs=2)))
            # A program that is compiled takes longer than a hang may.
            assert (await collect(front.generate("d", list(b"compile"), GREEDY)))[0] == TEXT
            assert front.stats()["engine_restarts_total"] == 0
            # Left early, aborted, and another one afterwards.
            stream = front.generate("a", [7], SamplingParams(ignore_eos=True))
            await anext(stream)
            await stream.aclose()
            stream = front.generate("b", list(b"slow"), GREEDY)
            await anext(stream)
            await front.abort("b")
            _, last, _ = await collect(stream)
            assert last.finish_reason == "abort" and last.output is not None
            assert (await collect(front.generate("c", [7], GREEDY)))[0] == TEXT
            assert front.stats()["kv_pages_used"] == 0

    run(test())


async def fails(stream):
    """The error that ends a stream, and when."""
    with pytest.raises(EngineDeadError) as info:
        await collect(stream)
    return str(info.value), time.monotonic()


def test_a_child_that_ends_is_replaced():
    async def test():
        async with serving() as front:
            for command, words in (
                (b"die", "SIGKILL"),
                (b"segv", "SIGSEGV"),
                (b"raise", "ValueError: boom"),
                (b"garbage", "wanted a list with a tag"),
            ):
                before, restarts = front.pid, front.stats()["engine_restarts_total"]
                slow = [front.generate(f"slow{i}", list(b"slow"), GREEDY) for i in range(3)]
                await anext(slow[0])
                start = time.monotonic()
                bad = front.generate("bad", list(command), GREEDY)
                ends = await asyncio.gather(*map(fails, (bad, *slow)))
                assert all(words in message and end - start < 2.0 for message, end in ends)
                with pytest.raises(CapacityError, match="restarting"):
                    front.generate("x", [7], GREEDY)
                assert words in front.status().error
                await front.wait_ready()
                assert front.pid != before and front.status().state == "ready"
                assert (await collect(front.generate("a", [7], GREEDY)))[0] == TEXT
                assert front.stats()["engine_restarts_total"] == restarts + 1

    run(test())


def test_a_child_that_hangs_is_replaced_within_the_limit(capfd):
    async def test():
        async with serving() as front:
            for how in ("hang", "stop"):
                await asyncio.sleep(1.3)  # an idle engine does not hang, however long it is idle
                assert front.status().state == "ready"
                start = time.monotonic()
                if how == "stop":
                    os.kill(front.pid, signal.SIGSTOP)
                message, end = await fails(front.generate("bad", list(b"hang"), GREEDY))
                assert "1 requests wait and no step was done" in message
                assert 0.9 < end - start < 4.0
                await front.wait_ready()
                assert (await collect(front.generate("a", [7], GREEDY)))[0] == TEXT

    run(test())
    # A stopped process cannot write where it is, a hanging one does.
    assert "fake_engine_child.py" in capfd.readouterr().err


def test_a_child_does_not_outlive_its_front():
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support import fake_engine_child
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.process_engine import ProcessEngine
async def main():
    front = ProcessEngine(EngineConfig(model="fake"), command=fake_engine_child.COMMAND)
    await front.wait_ready()
    front.generate("a", list(b"hang"), front.info.default_params)
    print(front.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    front = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with front:
        pid = int(front.stdout.readline())
        os.kill(pid, 0)
        front.kill()
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return  # nobody here to take its exit code
        time.sleep(0.01)
    raise AssertionError("the child lives on")


def test_the_front_needs_no_jax():
    code = "import sys, jaxmoe.engine.process_engine; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert not {"jax", "jaxlib", "flax", "numpy"} & set(loaded.stdout.decode().split())


def test_too_many_restarts_leave_it_dead():
    async def test():
        async with serving(Supervision(max_restarts=1, pauses_s=(0.0,))) as front:
            await fails(front.generate("a", list(b"die"), GREEDY))
            await front.wait_ready()
            await fails(front.generate("b", list(b"die"), GREEDY))
            while front.status().state != "dead":
                await asyncio.sleep(0.01)
            with pytest.raises(EngineDeadError, match="is dead: .*SIGKILL"):
                front.generate("c", [7], GREEDY)

    run(test())


def test_what_cannot_load_is_not_tried_again():
    async def test():
        front = ProcessEngine(EngineConfig(model="too large"), QUICK, fake_engine_child.COMMAND)
        with pytest.raises(CapacityError, match="loading"):
            front.generate("a", [7], GREEDY)
        with pytest.raises(EngineDeadError, match="no memory for it"):
            await front.wait_ready()
        assert front.stats()["engine_restarts_total"] == 0
        await front.close()

    run(test())


def test_closing_drains_aborts_and_ends_a_child_that_loads():
    async def test():
        async with serving() as front:
            stream = front.generate("a", list(b"slow"), GREEDY)
            task = asyncio.create_task(collect(stream))
            await asyncio.sleep(0.1)
            closing = asyncio.create_task(front.close(drain_s=20.0))
            await asyncio.sleep(0.01)
            assert front.status().state == "draining"
            assert (await task)[0] == TEXT
            await closing
        front = ProcessEngine(EngineConfig(model="slow to load"), QUICK, fake_engine_child.COMMAND)
        while front.status().percent != 50.0:
            await asyncio.sleep(0.05)
        assert front.status().stage == "loading weights"
        pid, start = front.pid, time.monotonic()
        await front.close()
        assert time.monotonic() - start < 4.0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test())


@pytest.fixture
def stores(monkeypatch):
    """Lists the stores there are, of names that no other process uses."""
    prefix = f"jaxmoe-test-{os.getpid()}-"
    monkeypatch.setattr(shared_store, "_PREFIX", prefix)
    yield lambda: list(shared_store.DIRECTORY.glob(f"{prefix}*"))
    shared_store.remove_unused()


def loading_model(how):
    """A fake model whose loading fills a store and then does `how`."""
    return f"{how} {shared_store.StoreName.of(b'half full').name}"


@pytest.mark.parametrize("how", ["fill and fail", "fill and die"])
def test_a_load_that_fails_leaves_no_memory_behind(stores, how):
    async def test():
        supervision = Supervision(max_restarts=1, pauses_s=(0.0,))
        config = EngineConfig(model=loading_model(how))
        front = ProcessEngine(config, supervision, fake_engine_child.COMMAND)
        with pytest.raises(EngineDeadError):
            await front.wait_ready()
        assert stores() == []
        await front.close()

    run(test())


@pytest.mark.parametrize("after_s", [None, 0.0, 0.2, 0.5])
def test_a_close_while_loading_leaves_no_memory_behind(stores, after_s):
    """Also one that is cancelled. The child does not answer: it is stopped."""

    async def test():
        config = EngineConfig(model=loading_model("fill and wait"))
        front = ProcessEngine(config, QUICK, fake_engine_child.COMMAND)
        while not stores():
            await asyncio.sleep(0.01)
        pid = front.pid
        os.kill(pid, signal.SIGSTOP)
        closing = asyncio.create_task(front.close())
        in_time = False
        if after_s is not None:
            await asyncio.sleep(after_s)
            in_time = closing.cancel()  # a fast machine has closed by then
        await asyncio.gather(closing, return_exceptions=True)
        assert closing.cancelled() == in_time
        assert stores() == []
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test())


def test_a_process_that_cannot_be_started_is_tried_again():
    async def test():
        def descriptors():
            return len(os.listdir("/proc/self/fd"))

        before = descriptors()
        supervision = Supervision(max_restarts=2, pauses_s=(0.0,))
        front = ProcessEngine(EngineConfig(model="fake"), supervision, ("/no/such/program",))
        with pytest.raises(EngineDeadError, match="could not be started.*No such file"):
            await front.wait_ready()
        assert front.stats()["engine_restarts_total"] == 2
        assert descriptors() == before
        await front.close()

    run(test())
