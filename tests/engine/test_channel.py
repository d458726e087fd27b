"""Messages survive the way, and nothing else does: broken ones are errors, whatever is in them."""

import dataclasses
import math
import random
import socket

import orjson
import pytest

from jaxmoe.common.errors import RequestError
from jaxmoe.common.timing import Timings
from jaxmoe.engine import channel
from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.engine.channel import MAX_FRAME_BYTES, Channel, FrameReader, frame
from jaxmoe.engine.codec import ChannelError, decode, encode
from jaxmoe.engine.messages import (
    AbortRequest,
    AddRequest,
    BeginPrompt,
    Configure,
    DropPrompt,
    Failed,
    Fatal,
    LayerDone,
    PrefillReady,
    PromptEnded,
    SetPace,
    Stage,
    Started,
    Stop,
)
from jaxmoe.request import CompletionOutput, Delta, RequestOutput, TokenLogprob
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.structured_output import StructuredOutput

PARAMS = SamplingParams(
    n=3,
    temperature=0.5,
    top_k=4,
    seed=2**64 - 1,
    stop=("a", "é"),
    stop_token_ids=(1, 2),
    logit_bias={5: -1.5, 7: 100},
    logprobs=2,
    prompt_logprobs=0,
    max_tokens=9,
    min_tokens=3,
    ignore_eos=True,
    structured=StructuredOutput.json_schema({"type": "object"}),
)
ENTRY = TokenLogprob(3, -math.inf, ((3, -0.5), (4, -math.inf)))
TIMINGS = Timings(1, 2, 0.5, 0.25, 0.125, 8.0, 1)
OUTPUT = RequestOutput(
    "r",
    None,
    (1, 2),
    (
        CompletionOutput(0, "x", (3,), "stop", "stop here", (ENTRY,), TIMINGS),
        CompletionOutput(1, "", (), "abort", 7, None, TIMINGS),
    ),
)
INFO = EngineInfo("m", 8, 9, 2, 3, 4, (1, 2), PARAMS, "report\nof lines", 5, False)
MESSAGES = [
    AddRequest("r", (1, 2**31 - 1), PARAMS, "salt"),
    AddRequest("r", (), SamplingParams()),
    AbortRequest("r"),
    Stop(),
    Delta("r", 1, "täxt\0👩", (1, 2), (ENTRY,), None, None, (None, ENTRY)),
    Delta("r", 0, "", (), None, "error", OUTPUT, None, "the grammar failed: x"),
    Delta("r", 0, "", (), None, "stop", None, None, 7),
    PrefillProgress("r", 3, 4),
    PrefillProgress("r", 3, 4, 5, 61, 2.5),
    Failed("r", "capacity", "full"),
    Configure({"model": None, "page_size": 3, "kv_cache_gb": 0.5, "show_progress": False}),
    Stage("loading", 12.5),
    Started(INFO, ("a", "b")),
    Fatal("checkpoint", "broken"),
    PrefillReady("/store", 9, 3, 10**12, 1.5, 0.25, 0.5, "rates", "plan"),
    BeginPrompt(7, 5, (1, 2), 3, (0, 2**32 - 1)),
    DropPrompt(7),
    SetPace(2.5e9),
    LayerDone(7, 2, 2**32 - 1),
    PromptEnded(7, "no"),
    PromptEnded(8),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_there_and_back(message):
    assert decode(encode(message)) == message


def test_every_sampling_parameter_goes_along():
    tested = {f.name for f in dataclasses.fields(SamplingParams)}
    again = decode(encode(AddRequest("r", (1,), PARAMS))).params
    assert all(getattr(again, name) == getattr(PARAMS, name) for name in tested)


def test_frames_in_any_pieces():
    data = b"".join(map(frame, MESSAGES))
    rng = random.Random(0)
    reader, got = FrameReader(), []
    while data:
        size = rng.randrange(1, 200)
        got += reader.feed(data[:size])
        data = data[size:]
    assert got == MESSAGES


def test_a_channel_ends_with_its_socket():
    a, b = socket.socketpair()
    with a, b:
        Channel(a).send(MESSAGES)
        a.shutdown(socket.SHUT_WR)
        assert list(Channel(b).receive()) == MESSAGES


@pytest.mark.parametrize(
    "data,words",
    [
        (b"\xff", "not JSON"),
        (b"{}", "wanted a list with a tag"),
        (b"[]", "wanted a list with a tag"),
        (b"[1]", "wanted a list with a tag"),
        (b'["import os"]', "unknown tag 'import os'"),
        (b'["abort"]', "'abort' is malformed"),
        (b'["abort",5]', "wanted a text"),
        (b'["stop",1]', "malformed"),
        (b'["add","r",[-1],{},null]', "got -1, wanted a whole number"),
        (b'["add","r",[true],{},null]', "got True"),
        (b'["add","r",[1],{"temperature":-1},null]', "temperature: got -1"),
        (b'["add","r",[1],{"top_q":1},null]', "unknown sampling parameter"),
        (b'["add","r",[1],[],null]', "wanted sampling parameters"),
        (b'["failed","r","bad kind","x"]', "wanted one of request"),
        (b'["configure",{"a":[1]}]', "wanted engine options"),
        (b'["started",{},[]]', "wanted an engine's description"),
        (b'["add","' + b"x" * 300 + b'",[1],{},null]', "at most 256 characters"),
    ],
)
def test_what_is_no_message_is_an_error(data, words):
    with pytest.raises(ChannelError, match=words):
        decode(data)


def test_frames_have_a_largest_size():
    with pytest.raises(ChannelError, match="wanted at most"):
        list(FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little")))


def test_an_event_that_is_too_large_refuses_its_request_only(monkeypatch):
    monkeypatch.setattr(channel, "MAX_FRAME_BYTES", 500)
    large = Delta("large", 0, "x" * 500, (1,))
    last = dataclasses.replace(large, request_id="last", output=OUTPUT)
    small = Delta("small", 0, "x", (1,))
    a, b = socket.socketpair()
    with a, b:
        assert Channel(a).send_events([small, large, last, small]) == ["large"]
        a.shutdown(socket.SHUT_WR)
        got = list(Channel(b).receive())
    assert [m.request_id for m in got] == ["small", "large", "last", "small"]
    assert got[0] == got[3] == small
    for failed in got[1:3]:
        assert isinstance(failed.error(), RequestError) and "wanted at most 500" in failed.message


def test_prompt_logprobs_are_sent_once():
    prompt = (None, *[ENTRY] * 100)
    output = dataclasses.replace(OUTPUT, prompt_logprobs=prompt)
    delta = Delta("r", 0, "", (), None, "stop", output, prompt)
    bare = dataclasses.replace(delta, output=OUTPUT)
    assert encode(delta) == encode(bare)


@pytest.mark.parametrize("seed", range(300))
def test_damaged_messages_are_channel_errors_or_messages(seed):
    rng = random.Random(seed)
    values = orjson.loads(encode(rng.choice(MESSAGES)))
    odd = [None, -1, 2**63, 1.5, "", "x", [], {}, True, [[]], {"a": 1}]
    spots = []

    def walk(node):
        keys = range(len(node)) if isinstance(node, list) else node
        for key in keys:
            spots.append((node, key))
            if isinstance(node[key], (list, dict)):
                walk(node[key])

    walk(values)
    for node, key in rng.sample(spots, min(len(spots), rng.randrange(1, 3))):
        node[key] = rng.choice(odd)
    try:
        decode(orjson.dumps(values))
    except ChannelError:
        pass
