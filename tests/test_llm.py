"""The Python door on a tiny random model: shapes of calls, errors, and texts that no batch
changes.
"""

import threading

import numpy as np
import pytest
from support import tiny_engine, tiny_tokenizer

import jaxmoe
from jaxmoe import SamplingParams
from jaxmoe.common.errors import ConfigError, EngineDeadError, RequestError
from jaxmoe.engine.engine import Engine
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.llm import LLM
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6)
LAYOUT = CacheLayout(page_size=4, num_pages=40, max_model_len=64, token_bytes=1)
USER = [{"role": "user", "content": "the earth"}]


@pytest.fixture(scope="module")
def llm():
    tiny = tiny_engine.model(tiny_engine.config(vocab_size=321))
    tokenizer = Tokenizer(
        tiny_tokenizer.byte_level(),
        {"bos_token": tiny_tokenizer.BOS, "eos_token": tiny_tokenizer.EOS, "add_bos_token": True},
    )
    engine = Engine(
        tiny_engine.step(tiny, LAYOUT, num_slots=2, chunk_tokens=16),
        LAYOUT,
        tokenizer=tokenizer,
        vocab_size=tiny.config.vocab_size,
        eos_token_ids=(1,),
        max_num_seqs=2,
        prefill_chunk_tokens=16,
    )
    template = ChatTemplate(tiny_tokenizer.CHAT_TEMPLATE, {"bos_token": tiny_tokenizer.BOS})
    with LLM.on_engine(engine, tokenizer, template) as llm:
        yield llm


@pytest.fixture(autouse=True)
def everything_is_given_back(llm):
    yield
    assert not llm.engine.has_work and llm._mail == {}
    assert llm.engine.pages.num_free == LAYOUT.num_pages


def test_one_prompt_many_prompts_and_ids(llm):
    one = llm.generate("the earth", GREEDY)
    assert len(one) == 1 and one[0].prompt == "the earth"
    ids = list(one[0].prompt_token_ids)
    assert ids == llm.tokenizer.encode("the earth")
    for prompts in (ids, [ids], np.array(ids), [np.array(ids)], tuple(ids), ["the earth"]):
        again = llm.generate(prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in again] == [one[0].outputs[0].token_ids]
    out = one[0].outputs[0]
    assert out.text == llm.tokenizer.decode(out.token_ids) == one.text
    assert out.finish_reason == "length" and out.timings.output_tokens == 6


def test_greedy_tokens_are_the_argmax_of_the_logits(llm):
    out = llm.generate("and void", SamplingParams(temperature=0, max_tokens=6, logprobs=2))[0]
    ids = [*out.prompt_token_ids, *out.outputs[0].token_ids]
    logits = llm.logits(ids[:-1])
    assert logits.shape == (len(ids) - 1, llm.engine.vocab_size)
    assert list(logits[-6:].argmax(-1)) == ids[-6:]
    raw = logits[-6:].astype(np.float64)
    want = raw.max(-1) - np.log(np.exp(raw).sum(-1))
    got = [e.logprob for e in out.outputs[0].logprobs]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_prompt_logprobs_are_those_of_the_logits(llm):
    text = "In the beginning God created the heaven and the earth and"
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    output = llm.generate(text, params)[0]
    first, *entries = output.prompt_logprobs
    ids = output.prompt_token_ids
    assert first is None and [e.token_id for e in entries] == list(ids[1:]) and len(ids) > 16
    raw = llm.logits(ids)[:-1].astype(np.float64)
    want = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    for row, entry in zip(want, entries, strict=True):
        np.testing.assert_allclose(entry.logprob, row[entry.token_id], rtol=1e-4, atol=1e-4)
        top_ids, top = zip(*entry.top, strict=True)
        assert list(top_ids) == list(np.argsort(-row)[:3])
        np.testing.assert_allclose(top, row[list(top_ids)], rtol=1e-4, atol=1e-4)
    plain = llm.generate(text, SamplingParams(temperature=0, max_tokens=2))[0]
    assert plain.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize(
    "more", [dict(temperature=0), dict(seed=3, repetition_penalty=1.7, frequency_penalty=0.4)]
)
def test_texts_are_the_same_with_and_without_the_prefix_cache(llm, more, monkeypatch):
    params = SamplingParams(max_tokens=6, **more)
    common = "In the beginning God created the heaven and the earth"
    prompts = [common + end for end in ("", " and", " was void", " and the")]

    def answers():
        outputs = llm.generate(prompts, params)
        return [o.outputs[0].token_ids for o in outputs], [
            o.outputs[0].timings.cached_tokens for o in outputs
        ]

    with monkeypatch.context() as off:
        off.setattr(llm.engine.scheduler, "prefix", None)
        want, cached = answers()
        assert cached == [0] * 4
    first, _ = answers()
    again, cached = answers()
    assert first == want and again == want
    assert min(cached) > 0 and all(count % 4 == 0 for count in cached)


PROMPTS = ["the earth", "In the beginning God", "x", "darkness was upon", "deep", "你好"]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(seed=3, max_tokens=6, top_p=0.9),
        SamplingParams(seed=4, max_tokens=6, repetition_penalty=1.3, presence_penalty=0.5),
    ],
    ids=["greedy", "top_p", "penalties"],
)
def test_texts_are_the_same_alone_and_in_any_mix(llm, params):
    alone = [llm.generate(p, params)[0].outputs[0].token_ids for p in PROMPTS]
    mixed = llm.generate(PROMPTS, params)
    assert [o.outputs[0].token_ids for o in mixed] == alone
    others = SamplingParams(temperature=1.5, max_tokens=9, logprobs=3)
    each = [params if i % 2 else others for i in range(len(PROMPTS))]
    mixed = llm.generate(PROMPTS[::-1], each[::-1])
    for i in range(1, len(PROMPTS), 2):
        assert mixed[len(PROMPTS) - 1 - i].outputs[0].token_ids == alone[i]


def test_n_choices_differ_and_the_first_is_that_of_n_1(llm):
    params = dict(seed=9, temperature=2.0, max_tokens=6)
    three = llm.generate("void", SamplingParams(n=3, **params))[0].outputs
    assert len({c.token_ids for c in three}) == 3
    assert (
        three[0].token_ids == llm.generate("void", SamplingParams(**params))[0].outputs[0].token_ids
    )


def test_stream_adds_up_to_generate(llm):
    deltas = list(llm.stream("the face of", GREEDY))
    want = llm.generate("the face of", GREEDY)[0].outputs[0]
    assert "".join(d.text for d in deltas) == want.text
    assert tuple(t for d in deltas for t in d.token_ids) == want.token_ids
    assert [d.finish_reason for d in deltas] == [None] * 5 + ["length"]
    assert deltas[-1].output.outputs[0].token_ids == want.token_ids


def test_a_stream_that_is_left_is_cancelled(llm):
    for delta in llm.stream("the face of", GREEDY):
        assert delta.finish_reason is None
        break
    del delta
    assert not llm.engine.has_work
    llm.stream("never begun", GREEDY)
    assert not llm.engine.has_work


def test_streams_and_threads_share_the_engine(llm):
    want = {p: llm.generate(p, GREEDY).text for p in PROMPTS}
    a, b = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    text = {a: "", b: ""}
    for x, y in zip(a, b, strict=True):
        text[a] += x.text
        text[b] += y.text
    assert [text[a], text[b]] == [want[PROMPTS[0]], want[PROMPTS[1]]]
    got = {}
    threads = [
        threading.Thread(target=lambda p=p: got.update({p: llm.generate(p, GREEDY).text}))
        for p in PROMPTS
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == want


def test_chat(llm):
    ids = llm.chat_prompt(USER)
    assert llm.tokenizer.decode(ids, skip_special_tokens=False) == "<｜bos｜>U: the earth\nA:"
    want = llm.generate(ids, GREEDY).text
    assert llm.chat(USER, GREEDY).text == want
    assert [o.text for o in llm.chat([USER, USER], GREEDY)] == [want, want]


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda llm: llm.generate(""), "prompt is empty"),
        (lambda llm: llm.generate([]), "empty list"),
        (lambda llm: llm.generate(None), "got None"),
        (lambda llm: llm.generate(5), "got 5"),
        (lambda llm: llm.generate({"prompt": "x"}), "wanted a text"),
        (lambda llm: llm.generate([[]]), "prompt is empty"),
        (lambda llm: llm.generate([1, "a"]), "entry 0 is 1"),
        (lambda llm: llm.generate(["a", 1]), "entry 1 is 1"),
        (lambda llm: llm.generate([-1]), "entry 0 is -1"),
        (lambda llm: llm.generate([10**6]), "entry 0 is 1000000"),
        (lambda llm: llm.generate([[1, True]]), "entry 1 is True"),
        (lambda llm: llm.generate("a\ud800"), "surrogate"),
        (lambda llm: llm.generate(["fine", "a" * 500]), "max_model_len"),
        (lambda llm: llm.generate("a", SamplingParams(max_tokens=999)), r"999.*holds 64"),
        (lambda llm: llm.generate("a", [GREEDY, GREEDY]), "got 2 for 1 prompts"),
        (lambda llm: llm.generate("a", {"temperature": 0}), "sampling_params: got"),
        (lambda llm: llm.stream(""), "prompt is empty"),
        (lambda llm: llm.stream(["a", "b"]), "got 2 prompts, wanted one"),
        (lambda llm: llm.chat("hi"), "messages: got 'hi'"),
        (lambda llm: llm.chat([]), "messages: got 0"),
        (lambda llm: llm.chat([{"role": "user"}]), "content: got None"),
        (lambda llm: llm.logits([]), "empty"),
        (lambda llm: llm.logits("text"), "wanted a list of token ids"),
        (lambda llm: llm.logits([1] * 65), "got 65 tokens"),
    ],
)
def test_bad_calls(llm, call, words):
    with pytest.raises(RequestError, match=words):
        call(llm)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(max_num_seq=4), "'max_num_seq'.*did you mean 'max_num_seqs'"),
        (dict(max_num_seqs=0), "max_num_seqs: got 0, wanted a whole number from 1 to 1024"),
        (dict(compute_dtype="float16"), "compute_dtype: got 'float16', wanted one of bfloat16"),
        (dict(kv_cache_gb=float("nan")), "kv_cache_gb: got nan"),
        (dict(show_progress=1), "show_progress"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        LLM("/nowhere", **options)


def test_a_closed_llm_says_so(llm):
    other = LLM.on_engine(llm.engine, llm.tokenizer)
    with pytest.raises(RequestError, match="no chat template"):
        other.chat(USER)
    stream = other.stream("x", GREEDY)
    other.close()
    for call in (lambda: other.generate("x"), lambda: other.logits([1]), lambda: next(stream)):
        with pytest.raises(EngineDeadError, match="closed"):
            call()
    llm.engine.abort(stream.request_id)


def test_the_package_offers_what_it_says():
    for name in jaxmoe.__all__:
        assert getattr(jaxmoe, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        jaxmoe.nonsense  # noqa: B018
