"""The engine on a step computable by hand: it writes a known text for each prompt, and
reads the prompt back through the pages it was given, so that a wrong page, slot or position
gives a wrong text.
"""

import logging

import pytest
from support import fake_step

from jaxmoe.common.errors import CapacityError, EngineDeadError, RequestError
from jaxmoe.config.generation import GenerationDefaults
from jaxmoe.decode.hybrid_step import RowResult
from jaxmoe.sampling_params import SamplingParams

EOS = fake_step.EOS
GREEDY = SamplingParams(temperature=0)


SCRIPT = {
    b"hello": " wörld, END of it".encode(),
    b"count": b"0123456789" * 3,
    b"emoji": "👩‍👩‍👧!".encode(),
    b"half": "é".encode()[:1],
    b"x": b"yz",
}


def make(**more):
    return fake_step.make_engine(lambda prompt: SCRIPT[prompt], **more)


def drain(engine):
    """All outputs by request id, checking that the deltas add up to them."""
    outputs, texts, ids = {}, {}, {}
    while engine.has_work:
        for d in engine.step():
            key = d.request_id, d.index
            texts[key] = texts.get(key, "") + d.text
            ids[key] = ids.get(key, ()) + d.token_ids
            if d.output is not None:
                outputs[d.request_id] = d.output
    for output in outputs.values():
        for c in output.outputs:
            key = output.request_id, c.index  # some steps may have been taken before
            assert c.token_ids[len(c.token_ids) - len(ids[key]) :] == ids[key]
            assert c.text.endswith(texts[key])
            assert len(ids[key]) < len(c.token_ids) or texts[key] == c.text
    engine.pages.check()
    assert engine.pages.num_free == engine.layout.num_pages
    return outputs


def ask(text, params=GREEDY, **more):
    engine, _ = make(**more)
    engine.add_request(list(text), params, request_id="a")
    return drain(engine)["a"].outputs[0]


@pytest.mark.parametrize(
    "prompt,params,text,reason,stop_reason",
    [
        (b"hello", GREEDY, " wörld, END of it", "stop", None),
        (b"hello", SamplingParams(max_tokens=4), " wö", "length", None),
        (b"hello", SamplingParams(max_tokens=3), " w\ufffd", "length", None),
        (b"hello", SamplingParams(stop="END"), " wörld, ", "stop", "END"),
        (
            b"hello",
            SamplingParams(stop=["xx", "END"], include_stop_str_in_output=True),
            " wörld, END",
            "stop",
            "END",
        ),
        (b"hello", SamplingParams(stop="it", max_tokens=18), " wörld, END of ", "stop", "it"),
        (b"hello", SamplingParams(stop="its"), " wörld, END of it", "stop", None),
        (b"hello", SamplingParams(stop_token_ids=[ord(",")]), " wörld", "stop", ord(",")),
        (b"x", SamplingParams(ignore_eos=True, max_tokens=4), "yz\x01\x01", "length", None),
        (b"x", SamplingParams(min_tokens=4), "yz~~", "stop", None),
        (b"x", SamplingParams(stop="y", min_tokens=2), "yz", "stop", None),
        (b"emoji", GREEDY, "👩‍👩‍👧!", "stop", None),
        (b"half", GREEDY, "\ufffd", "stop", None),
    ],
)
def test_how_a_text_ends(prompt, params, text, reason, stop_reason):
    out = ask(prompt, params)
    assert (out.text, out.finish_reason, out.stop_reason) == (text, reason, stop_reason)


def test_token_ids_hold_the_token_that_ended_the_text():
    assert ask(b"x").token_ids == (*b"yz", EOS)


def test_requests_run_together_and_do_not_mix():
    engine, step = make()
    for name in (b"hello", b"count", b"emoji", b"x", b"half"):
        engine.add_request(list(name), GREEDY, request_id=name.decode())
    outputs = drain(engine)
    for name, output in outputs.items():
        assert output.text == SCRIPT[name.encode()].decode(errors="replace")
    assert max(rows for kind, rows in step.calls if kind == "decode") == 4


def test_preemption_does_not_show():
    engine, _ = make(num_pages=12, max_model_len=40)
    for i in range(4):
        engine.add_request(list(b"count"), GREEDY, request_id=str(i))
    outputs = drain(engine)
    assert len(outputs) == 4 and {o.text for o in outputs.values()} == {"0123456789" * 3}


def test_n_completions_of_one_request():
    engine, _ = make()
    engine.add_request(list(b"x"), SamplingParams(n=3), request_id="a", prompt="x")
    output = drain(engine)["a"]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert output.prompt == "x" and output.prompt_token_ids == (ord("x"),)


def test_logprobs_are_given_for_each_token_when_asked():
    out = ask(b"x", SamplingParams(logprobs=2))
    assert [(e.token_id, e.logprob) for e in out.logprobs] == [(t, -0.5) for t in (*b"yz", EOS)]
    assert out.logprobs[0].top == ((ord("y"), -0.5), (7, -1.0))
    assert ask(b"x").logprobs is None
    assert ask(b"x", SamplingParams(logprobs=0)).logprobs[0].top == ()


@pytest.mark.parametrize("num_prompt", [1, 2, 16, 17, 35])
def test_prompt_logprobs_come_with_the_first_delta_of_the_first_completion(num_prompt):
    engine, step = fake_step.make_engine(lambda prompt: b"yz")
    prompt = list(range(10, 10 + num_prompt))
    engine.add_request(prompt, GREEDY, request_id="before")  # its pages must not be used
    drain(engine)
    engine.add_request(
        prompt, SamplingParams(n=2, prompt_logprobs=1, temperature=0), request_id="a"
    )
    engine.add_request(prompt, GREEDY, request_id="b")
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    given = [d for d in deltas if d.prompt_logprobs is not None]
    assert [(d.request_id, d.index) for d in given] == [("a", 0)]
    assert given[0] is next(d for d in deltas if (d.request_id, d.index) == ("a", 0))
    first, *rest = given[0].prompt_logprobs
    assert first is None
    assert [(e.token_id, e.logprob, e.top) for e in rest] == [
        (t, -float(i), ((t, -float(i)),)) for i, t in enumerate(prompt[1:], 1)
    ]
    outputs = {d.request_id: d.output for d in deltas if d.output is not None}
    assert outputs["a"].prompt_logprobs == given[0].prompt_logprobs
    assert outputs["b"].prompt_logprobs is None
    assert {c.text for o in outputs.values() for c in o.outputs} == {"yz"}
    cached = (num_prompt - 1) // 4 * 4
    assert [c.timings.cached_tokens for c in outputs["a"].outputs] == [0, cached]
    assert outputs["b"].outputs[0].timings.cached_tokens == cached


def test_timings_come_from_the_clock():
    t = ask(b"x").timings
    # The clock ticks once at arrival and twice a step; three steps draw the three tokens.
    assert (t.queue_s, t.ttft_s, t.tpot_s) == (1.0, 2.0, 2.0)
    assert (t.prompt_tokens, t.output_tokens, t.tok_per_s) == (1, 3, 3 / 6)


def test_one_line_is_logged_for_a_finished_request(caplog):
    with caplog.at_level(logging.INFO, "jaxmoe"):
        ask(b"x")
    assert [r.message for r in caplog.records] == [
        "request a[0]: 1 + 3 tokens, ttft 2.000 s, tpot 2.0000 s, stop"
    ]


@pytest.mark.parametrize("steps", range(5))
def test_abort_at_any_step(steps):
    engine, _ = make()
    engine.add_request(list(b"count"), SamplingParams(n=2), request_id="a")
    engine.add_request(list(b"x"), GREEDY, request_id="b")
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("never heard of")
    assert list(drain(engine)) in (["b"], [])  # b may have been done before
    assert not engine.has_work


@pytest.mark.parametrize(
    "ids,params,words",
    [
        ([], GREEDY, "prompt is empty"),
        ([256], GREEDY, "entry 0 is 256, wanted 0 to 255"),
        ([-1], GREEDY, "entry 0 is -1"),
        ([1.5], GREEDY, "entry 0 is 1.5"),
        ([1] * 40, GREEDY, "has 40 tokens, but the context holds 40"),
        (
            [1] * 30,
            SamplingParams(max_tokens=11),
            r"\(30 tokens\) \+ max_tokens \(11\) = 41.*holds 40.*lower max_tokens to 10",
        ),
        ([1] * 30, SamplingParams(min_tokens=11), "min_tokens: got 11, but at most 10"),
        ([1], SamplingParams(stop_token_ids=[256]), "stop_token_ids: entry 0 is 256"),
        ([1], SamplingParams(logit_bias={256: 1}), "logit_bias: entry 0 is 256"),
    ],
)
def test_refusals_leave_the_engine_as_it_was(ids, params, words):
    engine, _ = make()
    with pytest.raises(RequestError, match=words):
        engine.add_request(ids, params)
    assert not engine.has_work
    engine.add_request(list(b"x"), GREEDY, request_id="x")
    with pytest.raises(RequestError, match="'x' is in use"):
        engine.add_request(list(b"x"), GREEDY, request_id="x")
    assert drain(engine)["x"].text == "yz"


def test_without_a_tokenizer_there_are_ids_only():
    out = ask(b"x", tokenizer=False)
    assert out.text == "" and out.token_ids == (*b"yz", EOS)
    with pytest.raises(RequestError, match="no tokenizer"):
        ask(b"x", SamplingParams(stop="y"), tokenizer=False)


def test_max_tokens_left_open_fits_the_room_and_the_checkpoints_advice():
    assert len(ask(b"count", SamplingParams(ignore_eos=True)).token_ids) == 35
    advice = GenerationDefaults(max_tokens=7)
    assert len(ask(b"count", defaults=advice).token_ids) == 7
    long = GenerationDefaults(max_tokens=700)
    assert len(ask(b"count", SamplingParams(ignore_eos=True), defaults=long).token_ids) == 35


def test_the_checkpoints_sampling_advice_is_for_requests_that_say_nothing():
    advice = GenerationDefaults(SamplingParams(temperature=0.6))
    engine, _ = make(defaults=advice)
    for name, params in (("none", None), ("own", GREEDY)):
        engine.add_request(list(b"x"), params, request_id=name)
    kept = {s.request.request_id: s.request.params for s in engine.scheduler.waiting}
    assert kept == {"none": advice.params, "own": GREEDY}


def test_requests_without_a_seed_get_different_ones_the_same_in_every_run():
    def seeds():
        engine, _ = make(seed=5)
        for seed in (None, 3, None):
            engine.add_request([1], SamplingParams(seed=seed))
        return [s.request.seed for s in engine.scheduler.waiting]

    first = seeds()
    assert first == seeds() and first[1] == 3 and len(set(first)) == 3


def test_broken_logits_end_that_completion_only():
    engine, step = make()
    engine.add_request(list(b"x"), GREEDY, request_id="x")
    original = step.run
    step.run = lambda kind, rows, **_: [
        RowResult(-1, 0.0, (), ()) if r.settings.num_prompt == 5 else o
        for r, o in zip(rows, original(kind, rows), strict=True)
    ]
    engine.add_request(list(b"count"), GREEDY, request_id="bad")
    outputs = drain(engine)
    assert outputs["x"].text == "yz"
    assert outputs["bad"].outputs[0].finish_reason == "error"


def test_a_failed_step_kills_the_engine_with_its_reason():
    engine, step = make()
    engine.add_request(list(b"x"), GREEDY)
    step.fail_with = ValueError("boom")
    with pytest.raises(ValueError, match="boom"):
        engine.step()
    for call in (engine.step, lambda: engine.add_request([1]), lambda: engine.logits([1])):
        with pytest.raises(EngineDeadError, match="ValueError: boom"):
            call()


@pytest.mark.parametrize("usable", [True, False])
def test_an_interrupt_kills_only_an_engine_whose_caches_are_gone(usable):
    engine, step = make()
    engine.add_request(list(b"x"), GREEDY, request_id="x")
    step.fail_with, step.usable = KeyboardInterrupt(), usable
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    step.fail_with = None
    if usable:
        assert drain(engine)["x"].text == "yz"
    else:
        with pytest.raises(EngineDeadError):
            engine.step()


def test_logits_borrow_pages_and_a_slot():
    engine, _ = make(max_num_seqs=1)
    assert engine.logits([1] * 9) == (9, [0, 1, 2], 0)
    assert engine.pages.num_free == 32
    with pytest.raises(RequestError, match="got 41 tokens"):
        engine.logits([1] * 41)
    engine.add_request(list(b"count"), GREEDY)
    engine.step()
    with pytest.raises(CapacityError, match="max_num_seqs"):
        engine.logits([1])
