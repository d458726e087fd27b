"""Greedy tokens of one checkpoint with and without a prefill worker on a second CPU device, as
JSON: of requests that come and go at any step. A process of its own, for CPU devices are counted
once. Arguments: the checkpoint's directory, how many schedules, the worker's prefill_weights, one
or several with a comma between, and disaggregate, if it is not "on"; with "process" the worker is
killed at the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

os.environ["JAX_NUM_CPU_DEVICES"] = "2"
import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxmoe import LLM, SamplingParams  # noqa: E402
from jaxmoe.scheduler.prefill_route import PrefillRoute  # noqa: E402

LONG_TOKENS = 20  # from here on prompts are streamed


def prompts(seed: int) -> list[list[int]]:
    """Short and long ones; some begin alike, so that a streamed prompt goes on from known pages."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(1, 60, 40).tolist()
    lengths = (3, 45, 9, 70, 30, 1)
    return [rng.integers(1, 60, n).tolist() for n in lengths] + [
        beginning + rng.integers(1, 60, 12).tolist() for _ in range(2)
    ]


def params(i: int, schedules: int) -> SamplingParams:
    # Penalties make every program anew, which takes longer than the rest.
    penalty = 1.2 if i % 3 == 0 and schedules > 1 else 1.0
    return SamplingParams(
        temperature=0.0, max_tokens=4 + i, ignore_eos=True, repetition_penalty=penalty
    )


def schedule(llm: LLM, asked: list[tuple[list[int], SamplingParams]], rng: random.Random):
    """Tokens of every request; each comes at a step of its own, some are aborted and come again."""
    engine, outputs = llm.engine, {}
    waiting = rng.sample(range(len(asked)), len(asked))
    aborts = 2
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            i = waiting.pop()
            engine.add_request(*asked[i], request_id=str(i))
        if aborts and rng.random() < 0.05:
            going = [i for i in range(len(asked)) if i not in waiting and str(i) not in outputs]
            if going:
                i, aborts = rng.choice(going), aborts - 1
                engine.abort(str(i))
                waiting.insert(0, i)
        for delta in engine.step():
            if delta.output is not None:
                outputs[delta.request_id] = list(delta.output.outputs[0].token_ids)
    engine.pages.check()
    assert engine.pages.num_free == engine.layout.num_pages
    return [outputs[str(i)] for i in range(len(asked))]


FRESH = [list(range(7, 57)), [5, 3]]  # prompts that no schedule has: a streamed one, a short one


def kill_worker(llm: LLM) -> dict:
    """The long prompt's process dies beside a text that is decoded: the tokens of that text, and of
    the prompt asked again of the next process.
    """
    engine, worker = llm.engine, llm._started.long_prompts.worker
    given = params(20, 1)
    streamed = engine.stats()['steps_total{kind="stream"}']
    engine.add_request(FRESH[1], given, request_id="short")
    engine.step()
    engine.add_request(FRESH[0], given, request_id="long")
    outputs, first = {}, worker.pid
    while engine.has_work:
        if worker._job is not None and worker.pid == first:
            os.kill(first, signal.SIGKILL)
            while worker._job.failure is None:
                time.sleep(0.001)
        for delta in engine.step():
            if delta.output is not None:
                outputs[delta.request_id] = delta.output.outputs[0]
    assert outputs["long"].finish_reason == "error", outputs
    while not worker._there or llm._started.long_prompts.route.forced is not None:
        time.sleep(0.01)
    assert worker.pid != first
    again = llm.generate([FRESH[0]], given)[0].outputs[0]
    streamed = engine.stats()['steps_total{kind="stream"}'] - streamed
    return {"tokens": [list(again.token_ids), list(outputs["short"].token_ids)]} | {
        "streamed": streamed
    }


def run(directory: str, schedules: int, weights: str, disaggregate: str = "on") -> dict:
    assert len(jax.local_devices(backend="cpu")) == 2
    options = dict(compute_dtype="float32", max_model_len=96, max_num_seqs=4, page_size=4)
    options |= dict(num_threads=2, show_progress=False, prefill_chunk_tokens=16, device="cpu")
    found: dict = {"alone": [], "workers": {}}
    asked = [
        [(prompt, params(i, schedules)) for i, prompt in enumerate(prompts(seed))]
        for seed in range(schedules)
    ]
    with LLM(directory, **options) as llm:
        for requests in asked:
            answers = [llm.generate([p], given)[0] for p, given in requests]
            found["alone"].append([list(a.outputs[0].token_ids) for a in answers])
        if disaggregate == "process":
            fresh = llm.generate(FRESH, params(20, 1))
            found["fresh"] = [list(f.outputs[0].token_ids) for f in fresh]
        found["report_off"] = llm.report
        layout = llm.engine.layout
    # Pages for one prompt and a half, so that some have to give theirs back.
    pages_gb = (36 * layout.page_size * layout.token_bytes + 1) / 2**30
    options |= dict(disaggregate=disaggregate, prefill="auto", kv_cache_gb=pages_gb)
    options |= dict(shared_weights=disaggregate == "process")
    for how in weights.split(","):
        found["workers"][how] = beside(directory, options | dict(prefill_weights=how), asked)
    return found


def beside(directory: str, options: dict, asked: list) -> dict:
    """Of a worker with these options."""
    found: dict = {"mixed": []}
    with LLM(directory, **options) as llm:
        route = llm._started.long_prompts.route
        assert isinstance(route, PrefillRoute)
        route.pass_s, route.streamed_token_s, route.chunked_token_s = LONG_TOKENS * 1e-3, 0.0, 1e-3
        route.observe = lambda *args: None  # what this machine is like is no matter here
        for seed, requests in enumerate(asked):
            found["mixed"].append(schedule(llm, requests, random.Random(seed)))
        worker = llm._started.long_prompts.worker
        assert worker is not None
        found["handed_over"], found["num_layers"] = worker.handed_over, llm.model_config.num_layers
        stats = llm.engine.stats()
        found["streamed"] = stats['steps_total{kind="stream"}']
        found["preemptions"] = stats["preemptions_total"]
        found["report_on"] = llm.report
        if options["disaggregate"] == "process":
            found["killed"] = kill_worker(llm)
    return found


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])))
