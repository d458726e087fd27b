"""Grammars in the engine, on a tiny random model with the demo's real tokenizer: such a model
writes nonsense, so that whatever has form has it from the grammar.
"""

import json
from pathlib import Path

import pytest
from support import tiny_engine

import jaxmoe
from jaxmoe.common.errors import JaxMoeError, RequestError
from jaxmoe.engine.engine import Engine
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.llm import LLM
from jaxmoe.request import failure
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.structured_output import StructuredOutput as Spec
from jaxmoe.text.tokenizer import Tokenizer

EOS = 1
TOKENIZER = Tokenizer.from_dir(Path(jaxmoe.__file__).parent / "demo")
VOCAB = TOKENIZER.vocab_size + 77  # with rows of padding
LAYOUT = CacheLayout(page_size=4, num_pages=40, max_model_len=64, token_bytes=1)
SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 5},
        "number": {"type": "integer", "minimum": -9, "maximum": 99},
    },
    "required": ["word", "number"],
    "additionalProperties": False,
}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def step():
    tiny = tiny_engine.model(tiny_engine.config(vocab_size=VOCAB))
    return tiny_engine.step(tiny, LAYOUT, num_slots=2, chunk_tokens=16)


@pytest.fixture
def engine(step):
    engine = Engine(
        step,
        LAYOUT,
        tokenizer=TOKENIZER,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        max_num_seqs=2,
        prefill_chunk_tokens=16,
    )
    yield engine
    assert not engine.has_work and engine.pages.num_free == LAYOUT.num_pages


def drain(engine):
    outputs = {}
    while engine.has_work:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    return outputs


def ask(engine, spec, *, prompt=PROMPT, **params):
    params = {"temperature": 1.0, "seed": 1, "max_tokens": 40} | params
    engine.add_request(prompt, SamplingParams(structured=spec, **params), request_id="a")
    return drain(engine)["a"].outputs


def test_every_seed_writes_valid_json_and_no_padding(engine):
    seen = set()
    for seed in range(20):
        for out in ask(engine, Spec.json_schema(SCHEMA), seed=seed, n=2):
            assert out.finish_reason == "stop" and max(out.token_ids) < TOKENIZER.vocab_size
            value = json.loads(out.text)
            assert set(value) == {"word", "number"} and -9 <= value["number"] <= 99
            assert len(value["word"]) <= 5
            assert EOS not in out.token_ids, "its end is forced without a token"
            seen.add(out.text)
    assert len(seen) > 30


@pytest.mark.parametrize(
    "spec,params,text,reason,stop_reason",
    [
        (Spec.choice(["only"]), {}, "only", "stop", None),
        (Spec.choice(["only"]), {"temperature": 0}, "only", "stop", None),
        # The grammar allows no more: min_tokens gives way.
        (Spec.choice(["only"]), {"min_tokens": 30}, "only", "stop", None),
        (Spec.choice(["only"]), {"ignore_eos": True}, "only", "stop", None),
        (Spec.regex("x{3,12}"), {"logit_bias": {EOS: 100}}, "xxx", "stop", None),
        (Spec.regex("x{3}y{9}"), {"stop": "yyy"}, "xxx", "stop", "yyy"),
        (Spec.regex("x{3}y{9}"), {"stop": "q"}, "xxxyyyyyyyyy", "stop", None),
        # Bits that forbid are stronger than any bias, top_k and min_p.
        (Spec.choice(["a"]), {"logit_bias": {9: 100}, "top_k": 1, "min_p": 1.0}, "a", "stop", None),
    ],
)
def test_how_a_constrained_text_ends(engine, spec, params, text, reason, stop_reason):
    (out,) = ask(engine, spec, **params)
    assert (out.text, out.finish_reason, out.stop_reason) == (text, reason, stop_reason)


def test_min_tokens_holds_where_the_grammar_can_go_on(engine):
    for extra in ({"min_tokens": 9}, {"ignore_eos": True, "max_tokens": 12}):
        bias = {"logit_bias": {EOS: 50}}
        (out,) = ask(engine, Spec.regex("[xyz]+"), **extra, **bias)
        assert len(out.token_ids) - (out.token_ids[-1] == EOS) >= 9
        assert set(out.text) <= set("xyz")
    assert out.finish_reason == "length"
    (out,) = ask(engine, Spec.regex("(xyz)*"), logit_bias={EOS: 50})
    assert out.token_ids == (EOS,) and out.text == ""


def test_a_text_that_is_cut_off_has_finish_reason_length(engine):
    (out,) = ask(engine, Spec.json_schema(SCHEMA), max_tokens=3)
    assert out.finish_reason == "length" and len(out.token_ids) == 3
    with pytest.raises(ValueError):
        json.loads(out.text)
    # Complete with its last token: it is not cut off.
    (whole,) = ask(engine, Spec.json_schema(SCHEMA))
    (again,) = ask(engine, Spec.json_schema(SCHEMA), max_tokens=len(whole.token_ids))
    assert (again.text, again.finish_reason) == (whole.text, "stop")


def test_preemption_does_not_disturb_a_grammar(step):
    layout = CacheLayout(page_size=4, num_pages=12, max_model_len=48, token_bytes=1)
    engine = Engine(
        step,
        layout,
        tokenizer=TOKENIZER,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        max_num_seqs=2,
        prefill_chunk_tokens=16,
    )
    params = SamplingParams(seed=5, structured=Spec.regex("([a-z] ){20}"), max_tokens=45)
    for i in range(3):
        engine.add_request(PROMPT, params, request_id=str(i))
    sequences = list(engine.scheduler.waiting)
    texts = {o.text for o in drain(engine).values()}
    assert len(texts) == 1 and sum(s.num_preemptions for s in sequences) > 0
    assert texts.pop().count(" ") == 20


class Failing:
    """A grammar that fails at its third token."""

    complete, error, eos_token_ids, count = False, None, frozenset(), 0

    def mask(self, banned=()):
        return None

    def accept(self, token):
        self.count += 1
        self.error = "too complex" if self.count == 3 else None


def test_a_grammar_that_fails_ends_its_own_request(engine, caplog):
    good = SamplingParams(seed=5, structured=Spec.regex("[a-z]{8}"))
    engine.add_request(PROMPT, good, request_id="good")
    engine.add_request(PROMPT, good, request_id="bad")
    engine.scheduler.waiting[1].grammar = Failing()
    outputs = drain(engine)
    assert outputs["good"].outputs[0].finish_reason == "stop"
    (bad,) = outputs["bad"].outputs
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 3)
    assert bad.stop_reason == failure(bad) == "the grammar failed: too complex"
    assert "request bad: the grammar failed: too complex after" in caplog.text


def test_refusals_leave_the_engine_as_it_was(engine):
    with pytest.raises(RequestError, match="regex: "):
        engine.add_request(PROMPT, SamplingParams(structured=Spec.regex("(")), request_id="a")
    with pytest.raises(RequestError, match="regex: "):
        engine.prepare(SamplingParams(structured=Spec.regex("(")))
    assert not engine.has_work and ask(engine, Spec.choice(["x"]))[0].text == "x"


def test_without_a_tokenizer_there_is_no_structured_output(step):
    engine = Engine(
        step,
        LAYOUT,
        tokenizer=None,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        max_num_seqs=2,
        prefill_chunk_tokens=16,
    )
    with pytest.raises(RequestError, match="structured output: this engine has no tokenizer"):
        engine.add_request(PROMPT, SamplingParams(structured=Spec.choice(["x"])))
    assert not engine.has_work


def test_the_python_door_says_what_failed(engine, monkeypatch):
    llm = LLM.on_engine(engine, TOKENIZER)
    params = SamplingParams(structured=Spec.choice(["yes", "no"]))
    assert llm.generate("And", params).text in ("yes", "no")
    monkeypatch.setattr(engine, "_grammar", lambda request: Failing())
    with pytest.raises(JaxMoeError, match="the grammar failed: too complex"):
        llm.generate("And", params)
