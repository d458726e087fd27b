"""Prompts that are streamed a layer a step: order, company, cancelling, failing; and for real."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from support import fake_step, tiny_models

from jaxmoe import LLM
from jaxmoe.common.errors import ConfigError
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.scheduler.prefill_route import DslpRates, PrefillRoute

GREEDY = SamplingParams(temperature=0)
LAYERS = 3
LONG = b"a long prompt that is streamed"


class FakeStream:
    """Writes the row's tokens to the step's memory with its last layer."""

    def __init__(self, step: fake_step.FakeStep):
        self.step, self.row, self.done, self.log = step, None, 0, []
        self.num_layers = LAYERS - 1  # and a step after them
        self.fail_at, self.paths = -1, []

    def begin(self, row, path="slp"):
        assert self.row is None
        self.paths.append(path)
        self.row, self.done = row, 0
        self.log.append(("begin", row.start, len(row.token_ids)))

    def advance(self):
        self.done += 1
        self.log.append(("layer", self.done))
        if self.done == self.fail_at:
            self.row = None
            raise ValueError("copy 7 failed")
        if self.done < LAYERS:
            return self.done / LAYERS
        row, size = self.row, self.step.page_size
        for i, token in enumerate(row.token_ids, row.start):
            self.step.memory[row.pages[i // size], i % size] = token
        self.row = None
        return 1.0

    def stop(self):
        self.log.append(("stop",))
        self.row = None


def make(max_tokens=1000, forced=None, **more):
    route = PrefillRoute(1.0, 1e-3, 0.18, max_tokens, forced)  # from 6 tokens on
    streams = []

    def streamer(step):
        streams.append(FakeStream(step))
        return streams[0]

    engine, step = fake_step.make_engine(
        lambda prompt: b"ok" + prompt[:1], streamer=streamer, route=route, **more
    )
    return engine, step, streams[0]


def drain(engine):
    outputs = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.output is not None:
                outputs[delta.request_id] = delta.output.outputs[0]
    engine.pages.check()
    assert engine.pages.num_free == engine.layout.num_pages
    return outputs


def test_a_long_prompt_takes_a_step_a_layer_and_its_last_token_is_drawn():
    engine, step, stream = make()
    engine.add_request(list(LONG), GREEDY, request_id="long")
    progress = []
    for _ in range(LAYERS):
        assert engine.step() == []
        progress += engine.take_progress()
    # The clock ticks a second a look.
    assert [(p.layer, p.num_layers) for p in progress] == [(1, 2), (2, 2), (0, 0)]
    assert progress[0].left_s > progress[1].left_s > progress[2].left_s > 0
    assert all(p.prompt_tokens == len(LONG) for p in progress)
    progress = [p.computed_tokens for p in progress]
    assert stream.log == [("begin", 0, len(LONG) - 1), *(("layer", i + 1) for i in range(LAYERS))]
    assert progress[-1] == len(LONG) - 1 and progress == sorted(progress)
    assert drain(engine)["long"].text == "oka"
    assert step.calls[0] == ("prefill", 1)
    stats = engine.stats()
    assert stats['steps_total{kind="stream"}'] == 1
    assert stats['step_tokens_total{kind="stream"}'] == len(LONG) - 1


def test_a_python_program_is_told_how_far_its_prompts_are():
    engine, *_ = make(max_tokens=12, forced="slp")
    llm, told, others = LLM.on_engine(engine, None), [], []
    prompts = [list(LONG), list(b"x")]
    llm.generate(prompts, GREEDY, on_prefill=told.append)
    assert {p.request_id for p in told} == {"req-0", "req-1"}
    long = [p for p in told if p.request_id == "req-0"]
    # Three passes, and the last token.
    assert [p.layer for p in long] == [1, 2, 0] * 3 + [0]
    assert [p.computed_tokens for p in long if not p.num_layers] == [
        12,
        24,
        len(LONG) - 1,
        len(LONG),
    ]
    assert long[0].left_s > long[-2].left_s >= long[-1].left_s == 0
    list(llm.stream(prompts[0], GREEDY, on_prefill=others.append))
    assert others and len(told) == len(long) + 1 and llm._on_prefill == {}


def test_the_requests_line_has_its_path_and_the_time_foreseen(caplog):
    caplog.set_level(logging.INFO)
    engine, *_ = make()
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.add_request(list(b"abc"), GREEDY, request_id="short")
    drain(engine)
    lines = {line.split("[")[0]: line for line in caplog.messages if "ttft" in line}
    # The clock ticks a second a look: what was waited for counts, 1 s for the pass, 0.18 s a token.
    assert "ttft 17.000 s (slp, predicted 3.000 s)" in lines["request long"]
    assert "(chunked, predicted 3.540 s)" in lines["request short"]


def test_a_prompt_on_several_devices_is_predicted_and_corrected_as_that(caplog):
    caplog.set_level(logging.INFO)
    engine, _, stream = make(forced="dslp")
    route = engine._route
    route.dslp = DslpRates(pass_s=2.0, token_s=1e-3, max_tokens=20, num_devices=2)
    engine.add_request(list(LONG), GREEDY, request_id="long")
    assert drain(engine)["long"].text == "oka"
    begun = [entry for entry in stream.log if entry[0] == "begin"]
    assert begun == [("begin", 0, 20), ("begin", 20, len(LONG) - 21)]
    assert "request long: 20 prompt tokens by dslp, predicted 2.00 s" in caplog.text
    assert "(dslp, predicted" in caplog.text
    assert route.dslp.pass_s > 2.0 and route.pass_s == 1.0 and stream.paths == ["dslp"] * 2


def test_each_prompt_goes_the_way_that_is_chosen_for_it(caplog):
    """By what of it has to be computed, and what was learned since it came; a pass that has its way
    already keeps it.
    """
    caplog.set_level(logging.INFO)
    engine, _, stream = make()
    route = engine._route
    # In chunks below 6 tokens; on one device 1 s, or 50 ms a token; on several 1.5 s.
    route.streamed_token_s, route.free_devices = 0.05, 2
    route.dslp = DslpRates(pass_s=1.5, token_s=1e-3, max_tokens=1000, num_devices=2)
    # Figures as they are given: what the clock says is another test's.
    route.observe = lambda path, tokens, seconds: None
    for name, count in (("short", 4), ("middle", 20), ("long", 38)):
        engine.add_request([7 + count] * count, GREEDY, request_id=name)
        drain(engine)
    assert stream.paths == ["slp", "dslp"]
    lines = {line.split("[")[0]: line for line in caplog.messages if "ttft" in line}
    for name, path in (("short", "chunked"), ("middle", "slp"), ("long", "dslp")):
        assert f" ({path}, predicted " in lines[f"request {name}"]
    # All but a few tokens are cached now.
    engine.add_request([45] * 38, GREEDY, request_id="again")
    drain(engine)
    assert stream.paths == ["slp", "dslp"] and "request again" in caplog.text
    # Chosen while a chunk goes first.
    engine.add_request(list(b"x" * 38), GREEDY, request_id="chosen")
    engine.scheduler._last_prefill = "stream"
    engine.add_request(list(b"yz"), GREEDY, request_id="chunk")
    engine.step()
    assert stream.paths == ["slp", "dslp"]
    route.pass_s = route.chunked_token_s = 1e-9
    drain(engine)
    assert stream.paths == ["slp", "dslp", "dslp"]


def test_short_prompts_and_decodes_go_on_between_layers():
    engine, step, stream = make()
    engine.add_request(list(b"x"), SamplingParams(temperature=0, min_tokens=3), request_id="first")
    engine.step()
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.add_request(list(b"y"), GREEDY, request_id="short")
    kinds = []
    while engine.has_work:
        before, layers = len(step.calls), len(stream.log)
        engine.step()
        kinds += [k for k, _ in step.calls[before:]] or ["stream"] * (len(stream.log) > layers)
    first, last = kinds.index("stream"), len(kinds) - 1 - kinds[::-1].index("stream")
    between = kinds[first:last]
    assert "decode" in between and "prefill" in between, kinds


def test_a_second_long_prompt_waits_for_the_first():
    engine, step, stream = make(forced="slp")
    engine.add_request(list(LONG), GREEDY, request_id="one")
    engine.add_request(list(LONG), GREEDY, request_id="two")
    outputs = drain(engine)
    assert outputs["one"].text == outputs["two"].text == "oka"
    assert [e[0] for e in stream.log] == ["begin", *["layer"] * LAYERS] * 2
    assert step.calls.count(("prefill", 1)) == 2  # the last tokens only


def test_a_prompt_longer_than_a_pass_takes_several():
    engine, _, stream = make(max_tokens=12, forced="slp")
    engine.add_request(list(LONG), GREEDY, request_id="long")
    assert drain(engine)["long"].text == "oka"
    begun = [entry for entry in stream.log if entry[0] == "begin"]
    assert begun == [("begin", 0, 12), ("begin", 12, 12), ("begin", 24, len(LONG) - 25)]


def test_a_cancelled_prompt_is_stopped():
    engine, _, stream = make()
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.step()
    engine.abort("long")
    engine.add_request(list(b"x"), GREEDY, request_id="next")
    assert drain(engine)["next"].text == "okx"
    assert stream.log[-1] == ("stop",)


def test_a_failed_load_is_that_requests_failure_alone(caplog):
    engine, _, stream = make()
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.add_request(list(b"x"), GREEDY, request_id="short")
    stream.fail_at = 2
    outputs = drain(engine)
    assert outputs["long"].finish_reason == "error"
    assert "copy 7 failed" in outputs["long"].stop_reason
    assert "copy 7 failed" in caplog.text
    assert outputs["short"].text == "okx"
    stream.fail_at = -1
    engine.add_request(list(LONG), GREEDY, request_id="again")
    assert drain(engine)["again"].text == "oka"


class FakeWorker:
    """Computes a layer at each poll once `held` is false; `wait` lets it go on."""

    usable, max_tokens, num_layers = True, 1000, LAYERS - 1

    def __init__(self, step: fake_step.FakeStep):
        self.stream, self.held, self.waits = FakeStream(step), False, 0

    def begin(self, row):
        self.stream.begin(row)

    def poll(self):
        return 0.0 if self.held else self.stream.advance()

    def wait(self, timeout_s):
        self.waits, self.held = self.waits + 1, False

    def wake(self):
        pass

    def stop(self):
        self.stream.stop()


def make_aside(**more):
    route = PrefillRoute(1.0, 1e-3, 0.18, more.pop("max_tokens", 1000))
    workers = []

    def worker(step):
        workers.append(FakeWorker(step))
        return workers[0]

    engine, step = fake_step.make_engine(
        lambda prompt: b"ok" + prompt[:1], worker=worker, route=route, **more
    )
    return engine, step, workers[0]


def test_others_are_decoded_while_the_worker_computes():
    engine, step, worker = make_aside()
    worker.held = True
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.add_request(list(b"x"), SamplingParams(temperature=0, min_tokens=3), request_id="one")
    engine.add_request(list(b"y"), GREEDY, request_id="two")
    done = {}
    while len(done) < 2:
        assert worker.held, "they wait for the long prompt"
        done |= {d.request_id: d.output for d in engine.step() if d.output}
    assert [done[i].outputs[0].text for i in ("one", "two")] == ["okx", "oky"]
    assert drain(engine)["long"].text == "oka"
    assert worker.waits > 0 and worker.stream.log[0] == ("begin", 0, len(LONG) - 1)


def test_a_prompt_in_passes_and_a_second_one_aside():
    engine, _, worker = make_aside(max_tokens=12)
    worker.stream.max_tokens = 12
    engine.add_request(list(LONG), GREEDY, request_id="one")
    engine.add_request(list(LONG[:25]), GREEDY, request_id="two")
    outputs = drain(engine)
    assert outputs["one"].text == outputs["two"].text == "oka"
    assert [e for e in worker.stream.log if e[0] == "begin"][:2] == [
        ("begin", 0, 12),
        ("begin", 12, 12),
    ]


def test_an_aborted_prompt_is_stopped_at_once():
    engine, _, worker = make_aside()
    worker.held = True
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.step()
    engine.abort("long")
    assert worker.stream.log[-1] == ("stop",) and not engine.has_work
    engine.add_request(list(LONG), GREEDY, request_id="again")
    assert drain(engine)["again"].text == "oka"


def test_a_prompt_that_gives_its_pages_back_begins_again():
    # 10 pages: the long prompt's 8 and one of the short one, which then needs more.
    engine, _, worker = make_aside(num_pages=10, prefix_cache=False)
    worker.held = True
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request(list(b"xxxxxx"), params, request_id="short")
    engine.step()
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.step()
    seq = engine._aside.seq
    outputs = {}
    while "short" not in outputs:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output}
        worker.held = "short" not in outputs
    assert outputs["short"].outputs[0].text.startswith("okx") and seq.num_preemptions == 1
    assert drain(engine)["long"].text == "oka"


def test_a_workers_failure_is_that_requests_alone(caplog):
    engine, _, worker = make_aside()
    worker.stream.fail_at = 2
    engine.add_request(list(LONG), GREEDY, request_id="long")
    engine.add_request(list(b"x"), GREEDY, request_id="short")
    outputs = drain(engine)
    assert outputs["long"].finish_reason == "error" and "copy 7 failed" in caplog.text
    assert outputs["short"].text == "okx"


@pytest.mark.parametrize("aside", [False, True])
def test_streaming_is_throttled_while_others_decode(aside):
    calls = []
    engine, _, made = (make_aside if aside else make)(throttle=calls.append)
    route, before = engine._route, engine._route.pass_s
    observed = []
    route.observe = lambda *what: observed.append(what[0])
    engine.add_request(list(LONG), GREEDY, request_id="alone")
    engine.step()
    assert calls == []
    drain(engine)
    assert calls in ([], [True]) and observed.count("slp") == 1 and route.pass_s == before
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.add_request(list(b"x"), params, request_id="short")
    engine.step()
    engine.step()
    engine.add_request(list(LONG), GREEDY, request_id="beside")
    assert drain(engine)["beside"].text == "oka"
    assert calls[-2:] == [False, True] or calls[-1:] == [True]
    assert calls[1:] == [not c for c in calls[:-1]]
    assert observed.count("slp") == 1  # that one was held back


@pytest.mark.parametrize(
    "case", ["deepseek_v3_fp8", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_texts_of_streamed_prompts_are_those_of_chunks(case, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tiny_models.write_checkpoint(tmp_path, case)
    prompts = [np.random.default_rng(n).integers(1, 60, n).tolist() for n in (1, 2, 70)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, repetition_penalty=1.2)
    texts = {}
    for prefill in ("chunked", "slp"):
        with LLM(
            str(tmp_path),
            device="cpu",
            prefill=prefill,
            compute_dtype="float32",
            max_num_seqs=2,
            max_model_len=96,
            num_threads=1,
            show_progress=False,
        ) as llm:
            texts[prefill] = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        assert caplog.text.count("prompt tokens by slp") == (0 if prefill == "chunked" else 2)
    assert texts["slp"] == texts["chunked"]


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match="JAX sees no NVIDIA GPU"):
        LLM(str(tmp_path), device="gpu", show_progress=False)
