"""The embedded demo model in an engine process: the same tokens as in this process, and again after
the process was killed or stopped in the middle of them.
"""

import asyncio
import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest

from jaxmoe import LLM
from jaxmoe.common.errors import EngineDeadError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.process_engine import ProcessEngine, Supervision
from jaxmoe.engine.watchdog import Patience
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.weights import shared_store

PROGRAMS = Path(__file__).parents[2] / "build" / "test_programs"
OPTIONS = dict(
    max_num_seqs=4,
    max_model_len=256,
    page_size=4,
    prefill_chunk_tokens=64,
    cache_dir=str(PROGRAMS),
    show_progress=False,
)
PROMPTS = ["In the beginning", "And the earth was", "In the beginning God created the heaven"]
PARAMS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def expected():
    """Prompts as ids, and what follows them, from an engine in this process."""
    with LLM(**OPTIONS, prefix_cache=False) as llm:
        ids = [llm.prompt_ids(p) for p in PROMPTS]
        return [(p, llm.generate(p, PARAMS)[0].outputs[0].token_ids) for p in ids]


async def collect(stream):
    return [d async for d in stream if isinstance(d, Delta)][-1].output.outputs[0].token_ids


async def check_texts(front, expected, name):
    streams = [
        front.generate(f"{name}-{i}", ids, PARAMS) for i, (ids, _) in enumerate(expected * 2)
    ]
    for stream, (_, want) in zip(streams, expected * 2, strict=True):
        assert await collect(stream) == want


async def kill_and_recover(front, expected, number, name, within_s, rng):
    """One request in flight, the signal somewhere in it."""
    # Long, since several tokens may come in one item.
    params = dataclasses.replace(PARAMS, max_tokens=240)
    stream = front.generate(f"{name}-victim", expected[0][0], params)
    for _ in range(rng.randrange(1, 12)):
        await anext(stream)
    pid, start = front.pid, time.monotonic()
    os.kill(pid, number)
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass
    assert time.monotonic() - start < within_s
    assert front.status().state == "restarting"
    await front.wait_ready()
    assert front.pid != pid
    await check_texts(front, expected, name)


def drive(expected, signals, patience_s):
    async def test():
        supervision = Supervision(
            patience=Patience(least_s=patience_s, factor=1.0),
            max_restarts=len(signals),
            pauses_s=(0.0,),
            check_s=0.2,
        )
        front = ProcessEngine(EngineConfig(**OPTIONS), supervision)
        rng = random.Random(0)
        try:
            await front.wait_ready()
            assert "model:" in front.info.report and front.info.has_tokenizer
            await check_texts(front, expected, "first")
            store = front.info.store_name
            assert store in front.info.report
            for i, number in enumerate(signals):
                limit = 2.0 if number != signal.SIGSTOP else patience_s + 4.0
                await kill_and_recover(front, expected, number, f"after{i}", limit, rng)
                # The experts were still there: only the other weights were read again.
                assert front.info.store_name == store
                assert "of experts were in shared memory already" in front.info.report
            stats = front.stats()
            assert stats["prefix_cache_hit_tokens_total"] > 0 and stats["kv_pages_used"] == 0
            assert stats["weight_bytes_read_total"] > 1e6
            assert stats["last_decode_step_weight_bytes"] > 1e4
        finally:
            await front.close()
        assert shared_store.present_bytes(store) == 0

    asyncio.run(asyncio.wait_for(test(), 550))


def test_the_same_tokens_before_and_after_a_kill(expected):
    drive(expected, [signal.SIGKILL], 30.0)


@pytest.mark.slow
def test_the_same_tokens_after_every_kind_of_end(expected):
    drive(expected, [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, signal.SIGABRT] * 3, 5.0)
