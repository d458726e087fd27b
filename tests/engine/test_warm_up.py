"""Programs compiled ahead: in order, beside requests, never in their way, and ended at once."""

import asyncio
import dataclasses
import logging
import threading
import time

import numpy as np
import pytest
from support import tiny_engine

from jaxmoe.decode.batch import StepRow, compiled_ahead, step_shapes
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.thread_engine import ThreadEngine
from jaxmoe.engine.warm_up import WarmUp
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.request import Delta
from jaxmoe.sampling.inputs import RowSettings
from jaxmoe.sampling_params import SamplingParams

SHAPES = [("prefill", 16, 1, ""), ("decode", 1, 1, ""), ("decode", 2, 2, "masks")]
LAYOUT = CacheLayout(page_size=4, num_pages=40, max_model_len=48, token_bytes=1)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[3, 1, 4, 1, 5], [2, 7, 1], list(range(1, 30))]


class Compiler:
    """Compiles when it is let; knows what has begun."""

    def __init__(self, errors=None):
        self.begun, self.errors = [], errors or {}
        self.may_end = threading.Semaphore(0)

    def __call__(self, shape):
        self.begun.append(shape)
        assert self.may_end.acquire(timeout=10)
        if shape in self.errors:
            raise self.errors[shape]


def until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def figures(warm_up):
    f = warm_up.snapshot()
    return f["warm_up_programs_compiled"], f["warm_up_programs_planned"]


def test_one_after_the_other_in_order():
    compiler, told = Compiler(), []
    warm_up = WarmUp(SHAPES, compiler, lambda: False)
    assert "3 programs" in warm_up.describe() and "prefill of 16 tokens" in warm_up.describe()
    warm_up.start(lambda: told.append(figures(warm_up)))
    warm_up.start()
    for i in range(len(SHAPES)):
        until(lambda i=i: len(compiler.begun) == i + 1)
        assert warm_up.compiling
        compiler.may_end.release()
    warm_up._thread.join(10)
    assert compiler.begun == SHAPES and told == [(1, 3), (2, 3), (3, 3)]
    assert not warm_up.compiling and warm_up.snapshot()["warm_up_seconds_total"] > 0
    warm_up.close()


def test_pauses_while_there_is_work():
    """Three times as long as it compiled by a clock that a compilation moves on by 100 s."""
    now, busy, compiler = [0.0], [True], Compiler()

    def compile(shape):
        compiler(shape)
        now[0] += 100.0

    warm_up = WarmUp(SHAPES, compile, lambda: busy[0], clock=lambda: now[0])
    warm_up.start()
    compiler.may_end.release()
    until(lambda: figures(warm_up) == (1, 3))
    now[0] += 299.0
    time.sleep(0.15)  # that it would begin in is no more than CHECK_S
    assert len(compiler.begun) == 1 and not warm_up.compiling
    now[0] += 2.0
    until(lambda: len(compiler.begun) == 2)
    compiler.may_end.release()
    until(lambda: figures(warm_up) == (2, 3))
    busy[0] = False
    until(lambda: len(compiler.begun) == 3)
    compiler.may_end.release()
    warm_up.close()


def test_close_waits_for_one_and_begins_no_other():
    compiler = Compiler()
    warm_up = WarmUp(SHAPES, compiler, lambda: False)
    warm_up.start()
    until(lambda: compiler.begun)
    closing = threading.Thread(target=warm_up.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    compiler.may_end.release()
    closing.join(10)
    assert not closing.is_alive() and len(compiler.begun) == 1
    warm_up.start()
    assert not warm_up._thread.is_alive()
    WarmUp(SHAPES, compiler, lambda: False).close()  # never begun


def test_a_failure_is_said_and_ends_it(caplog):
    compiler = Compiler({SHAPES[1]: MemoryError("no room")})
    warm_up = WarmUp(SHAPES, compiler, lambda: False)
    with caplog.at_level(logging.ERROR):
        compiler.may_end.release(3)
        warm_up.start()
        warm_up._thread.join(10)
    assert len(compiler.begun) == 2 and figures(warm_up) == (1, 3) and not warm_up.compiling
    assert "decode of 1 tokens, 1 rows: no room" in caplog.text


def make(warm=True):
    """An engine of a tiny model, its step, and what compiles ahead for it."""
    tiny = tiny_engine.model(tiny_engine.config())
    step = tiny_engine.step(tiny, LAYOUT, num_slots=4, chunk_tokens=16)
    engine = Engine(
        step, LAYOUT, tokenizer=None, vocab_size=tiny.config.vocab_size, eos_token_ids=(),
        max_num_seqs=4, prefill_chunk_tokens=16,
    )  # fmt: skip
    shapes = compiled_ahead(step_shapes(4, 16), 16)
    if warm:
        engine.warm_up = WarmUp(shapes, lambda shape: step.prepare(*shape), lambda: engine.has_work)
    return engine, step, shapes


def texts(engine):
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, GREEDY, request_id=str(i))
    out = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.output is not None:
                out[delta.request_id] = delta.output.outputs[0].token_ids
    return out


@pytest.mark.slow
def test_steps_find_every_program_that_was_compiled_ahead():
    engine, step, shapes = make(warm=False)
    want = texts(engine)
    assert engine.stats()["compiled_steps_total"] == step.num_programs > 2
    assert engine.stats()["warm_up_programs_planned"] == 0
    step.close()
    engine, step, shapes = make()
    assert [step.prepare(*shape) for shape in shapes] == [True] * len(shapes)
    assert not any(step.prepare(*shape) for shape in shapes)
    assert texts(engine) == want
    assert engine.stats()["compiled_steps_total"] == 0 and step.num_programs == len(shapes)
    step.close()
    assert step.num_programs == 0


def drawn_masked(step, token):
    """What a decode draws that may draw that token alone."""
    mask = np.zeros(-(-step._vocab_size // 32), np.uint32)
    mask[token // 32] = 1 << token % 32
    settings = RowSettings(GREEDY, 0, 0, 0, 0, 0, 1)
    step.assign(0)
    return step.run("decode", [StepRow((1,), 0, (0,), 0, settings, mask=mask)])[0].token_id


def test_masked_biased_and_scored_requests_alone_find_their_programs():
    engine, step, shapes = make(warm=False)
    wanted = [s for s in shapes if s[3] and s[0] == "decode"] + [shapes[-1]]
    assert [s[3] for s in wanted] == ["masks", "biases", "targets"]
    for shape in [*wanted, ("prefill", 16, 1, "biases")]:
        assert step.prepare(*shape)
    biased = dataclasses.replace(GREEDY, frequency_penalty=0.5, logit_bias={7: 100.0})
    scored = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    for params in (biased, scored):
        engine.add_request(PROMPTS[0], params)
        while engine.has_work:
            ended = [d.output for d in engine.step() if d.output is not None]
        assert len(ended) == 1
        if params is biased:
            assert ended[0].outputs[0].token_ids == (7,) * 6
    assert drawn_masked(step, 9) == 9
    assert engine.stats()["compiled_steps_total"] == 0 and step.num_programs == 4
    step.close()


def test_a_request_waits_for_its_own_programs_alone(monkeypatch):
    """The first program of all is never done while requests come that need others."""
    engine, step, shapes = make()
    stuck, may_end, begun = ("decode", 4, 4, ""), threading.Event(), threading.Event()
    compile = step._compile

    def compiling(variant, inputs):
        if (variant.kind, *inputs.step.token_ids.shape) == stuck[:2]:
            begun.set()
            assert may_end.wait(30)
        return compile(variant, inputs)

    monkeypatch.setattr(step, "_compile", compiling)
    plain = [s for s in shapes if s != stuck and not s[3]]
    engine.warm_up._programs = shapes = (stuck, *plain)

    async def ask(front, i):
        items = [item async for item in front.generate(str(i), PROMPTS[i], GREEDY)]
        return [t for item in items if isinstance(item, Delta) for t in item.token_ids]

    async def test():
        front = ThreadEngine.on_engine(engine)
        await front.wait_ready()
        assert begun.wait(10)
        alone = [await ask(front, i) for i in range(3)]
        assert engine.warm_up.compiling and figures(engine.warm_up) == (0, len(shapes))
        assert front.stats()["compiled_steps_total"] > 0
        waiting = asyncio.gather(*(ask(front, i) for i in range(3)))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done  # three rows need the very program that is being compiled
        may_end.set()
        assert await waiting == alone
        # An idle engine tells how far it is.
        while front.stats()["warm_up_programs_compiled"] < len(shapes):
            await asyncio.sleep(0.01)
        assert front.status().state == "ready"
        await front.close()
        engine.warm_up.close()

    asyncio.run(asyncio.wait_for(test(), 60))
    step.close()


@pytest.mark.parametrize("compiling, learns", [(False, True), (True, False)])
def test_steps_beside_a_compiler_teach_nothing(compiling, learns):
    engine, step, shapes = make()
    for shape in shapes:
        if not shape[3]:
            step.prepare(*shape)
    engine.warm_up._compiling = compiling
    texts(engine)  # the third prompt has a whole chunk
    assert (engine._chunk_token_s > 0) == learns
    step.close()
