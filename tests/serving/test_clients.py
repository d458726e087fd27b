"""The official clients' ordinary calls, against a real server process on the demo model."""

import asyncio
import json
from pathlib import Path

import anthropic
import openai
import pydantic
import pytest

MODEL = "jaxmoe-demo"
ASK = [{"role": "user", "content": "Who are you?"}]
BEGINS = "I am the demonstration model of jaxmoe"
GREEDY = {"temperature": 0}  # of which Anthropic's newest client knows nothing
TOOL = {
    "type": "object",
    "properties": {"city": {"enum": ["Ur", "Uz"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": TOOL}}]


class Verse(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    book: str = pydantic.Field(pattern="^(Ruth|Job)$")
    chapter: int = pydantic.Field(ge=1, le=9)


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(
        base_url=demo_server.url + "/v1", api_key="-", timeout=120, max_retries=0
    ) as c:
        yield c


@pytest.fixture(scope="module")
def claude(demo_server):
    with anthropic.Anthropic(
        base_url=demo_server.url, api_key="-", timeout=120, max_retries=0
    ) as c:
        yield c


def chat(client, **more):
    more = {"max_tokens": 16, "temperature": 0, "messages": ASK} | more
    return client.chat.completions.create(model=MODEL, **more)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_chat(client):
    answer = chat(client, max_tokens=24)
    assert answer.choices[0].message.content.startswith(BEGINS)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streams_the_same_text(client):
    whole = chat(client).choices[0]
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason == "length"


def test_the_stream_helper(client):
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, max_tokens=64, temperature=0, stop=","
    ) as stream:
        kinds = [e.type for e in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and final.choices[0].message.content.startswith(BEGINS[:10])


def test_several_choices_and_logprobs(client):
    answer = chat(client, n=3, logprobs=True, top_logprobs=2, temperature=1.0, seed=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    for c in answer.choices:
        assert "".join(t.token for t in c.logprobs.content) == c.message.content
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in c.logprobs.content)
    assert chat(client, n=3, temperature=1.0, seed=3).choices[1] is not None
    streamed = list(chat(client, n=3, stream=True, temperature=1.0, seed=3))
    texts = ["", "", ""]
    for c in streamed:
        texts[c.choices[0].index] += c.choices[0].delta.content or ""
    assert texts == [c.message.content for c in answer.choices]


def test_a_json_schema(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Verse, max_tokens=60, temperature=0
    )
    verse = answer.choices[0].message.parsed
    assert verse.book in ("Ruth", "Job") and 1 <= verse.chapter <= 9
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, response_format=Verse, max_tokens=60, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == verse
    loose = chat(client, response_format={"type": "json_object"}, max_tokens=200, seed=1)
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(client, choice):
    answer = chat(client, tools=TOOLS, tool_choice=choice, max_tokens=80, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Ur", "Uz")
    chunks = chat(client, tools=TOOLS, tool_choice=choice, max_tokens=80, stream=True,
                  parallel_tool_calls=False)  # fmt: skip
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    parts = [p for d in deltas for p in d.tool_calls or ()]
    assert parts[0].id and parts[0].function.name == "weather"
    assert "".join(p.function.arguments for p in parts) == call.function.arguments
    # And the result goes back in.
    history = [
        *ASK,
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "dry"},
    ]
    assert chat(client, messages=history, tools=TOOLS).choices[0].message.role == "assistant"


def test_tools_the_model_is_free_to_use(client):
    for choice in ("auto", "none"):
        answer = chat(client, tools=TOOLS, tool_choice=choice)
        assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")


def test_completions(client):
    answer = client.completions.create(
        model=MODEL, prompt=["And God said", "The king"], max_tokens=6, temperature=0, logprobs=1,
        echo=True,
    )  # fmt: skip
    first, second = answer.choices
    assert first.text.startswith("And God said") and second.text.startswith("The king")
    assert first.logprobs.token_logprobs[0] is None and first.logprobs.token_logprobs[1] < 0
    assert "".join(first.logprobs.tokens) == first.text
    stream = client.completions.create(
        model=MODEL, prompt="The king", max_tokens=6, temperature=0, stream=True
    )
    assert "The king" + "".join(c.choices[0].text for c in stream) == second.text


def test_responses(client):
    more = {"model": MODEL, "input": "Who are you?", "temperature": 0}
    short = client.responses.create(**more, max_output_tokens=4)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"
    more["max_output_tokens"] = 200  # the model ends earlier
    answer = client.responses.create(**more)
    assert answer.output_text.startswith(BEGINS) and answer.status == "completed"
    with client.responses.stream(**more) as stream:
        kinds = [e.type for e in stream]
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds
    parsed = client.responses.parse(
        model=MODEL, input="Who?", text_format=Verse, max_output_tokens=60, temperature=0
    )
    assert parsed.output_parsed.book in ("Ruth", "Job")
    tool = {"type": "function", "name": "weather", "parameters": TOOL, "strict": True}
    called = client.responses.create(
        model=MODEL, input="Rain?", tools=[tool], tool_choice="required", max_output_tokens=80,
        temperature=0, parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = [i for i in called.output if i.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Ur", "Uz")
    history = [
        {"role": "user", "content": "Rain?"},
        *called.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "none"},
    ]
    again = client.responses.create(
        model=MODEL, input=history, tools=[tool], max_output_tokens=8, temperature=0
    )
    assert again.usage.input_tokens > called.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_1")


def test_messages(claude):
    more = {"model": MODEL, "messages": ASK, "extra_body": GREEDY, "max_tokens": 16}
    answer = claude.messages.create(**more)
    assert answer.content[0].text.startswith(BEGINS[:20]) and answer.stop_reason == "max_tokens"
    with claude.messages.stream(**more) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == answer.content[0].text == final.content[0].text
    assert final.usage.output_tokens == 16 and final.stop_reason == "max_tokens"
    count = claude.messages.count_tokens(model=MODEL, messages=ASK)
    assert count.input_tokens == answer.usage.input_tokens + (
        answer.usage.cache_read_input_tokens or 0
    )
    stopped = claude.messages.create(**more, stop_sequences=[" the"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " the")


def test_messages_with_tools(claude):
    tools = [{"name": "weather", "description": "of a city", "input_schema": TOOL}]
    more = {"model": MODEL, "extra_body": GREEDY, "max_tokens": 80, "tools": tools}
    more["system"] = "Short."
    forced = {"type": "any", "disable_parallel_tool_use": True}
    answer = claude.messages.create(**more, messages=ASK, tool_choice=forced)
    assert answer.stop_reason == "tool_use"
    (use,) = [b for b in answer.content if b.type == "tool_use"]
    assert use.name == "weather" and use.input["city"] in ("Ur", "Uz")
    with claude.messages.stream(**more, messages=ASK, tool_choice=forced) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "dry"}
    history = [
        *ASK,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    assert claude.messages.create(**more, messages=history).role == "assistant"


def test_errors_are_the_clients_own(client, claude):
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, temperature=-1)
    assert e.value.param == "temperature" and "temperature" in str(e.value)
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, max_tokens=10**6)
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="x", messages=ASK)
    with pytest.raises(anthropic.BadRequestError) as e:
        claude.messages.create(model=MODEL, messages=[], max_tokens=5)
    assert e.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="x", messages=ASK, max_tokens=5)


def test_async_clients(demo_server):
    async def test():
        async with (
            openai.AsyncOpenAI(base_url=demo_server.url + "/v1", api_key="-", timeout=120) as a,
            anthropic.AsyncAnthropic(base_url=demo_server.url, api_key="-", timeout=120) as b,
        ):
            more = {"model": MODEL, "messages": ASK, "extra_body": GREEDY, "max_tokens": 16}
            answers = await asyncio.gather(
                *(a.chat.completions.create(**more) for _ in range(3)),
                b.messages.create(**more),
            )
            texts = [x.choices[0].message.content for x in answers[:3]]
            assert set(texts) == {answers[3].content[0].text}
            streamed = ""
            async for c in await a.chat.completions.create(**more, stream=True):
                streamed += c.choices[0].delta.content or ""
            assert streamed == texts[0]
            async with b.messages.stream(**more) as stream:
                assert await stream.get_final_text() == streamed

    asyncio.run(test())


@pytest.mark.filterwarnings("ignore")  # its own
def test_litellm(demo_server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm", reason="pip install .[serve_test]")
    more = {"messages": ASK, "max_tokens": 8, "temperature": 0, "api_key": "-"}
    base = demo_server.url + "/v1"
    answer = litellm.completion(model=f"openai/{MODEL}", api_base=base, **more)
    assert answer.choices[0].message.content.startswith("I am the")
    chunks = litellm.completion(model=f"openai/{MODEL}", api_base=base, stream=True, **more)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == answer.choices[0].message.content
    ask = {"model": f"openai/{MODEL}", "api_base": base, **more}

    async def asynchronous():
        whole = await litellm.acompletion(**ask)
        streamed = ""
        async for c in await litellm.acompletion(**ask, stream=True):
            streamed += c.choices[0].delta.content or ""
        return whole.choices[0].message.content, streamed

    assert asyncio.run(asynchronous()) == (text, text)
    several = litellm.completion(**ask, n=2, logprobs=True, top_logprobs=2)
    assert [c.message.content for c in several.choices] == [text, text]
    entries = several.choices[0].logprobs.content
    assert "".join(e.token for e in entries) == text and len(entries[0].top_logprobs) == 2
    more["max_tokens"] = 80
    called = litellm.completion(**{**ask, **more}, tools=TOOLS, tool_choice="required")
    (call,) = called.choices[0].message.tool_calls[:1]
    assert json.loads(call.function.arguments)["city"] in ("Ur", "Uz")
    schema = {"name": "verse", "schema": Verse.model_json_schema(), "strict": True}
    formed = litellm.completion(
        **{**ask, **more}, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert Verse.model_validate_json(formed.choices[0].message.content).chapter in range(1, 10)
    # Functions that are strict, called or not as the model likes.
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    free = litellm.completion(**{**ask, **more}, tools=strict, parallel_tool_calls=False)
    assert len(free.choices[0].message.tool_calls or []) <= 1


@pytest.mark.filterwarnings("ignore")
def test_langchain(demo_server):
    langchain = pytest.importorskip("langchain_openai", reason="pip install .[serve_test]")
    messages = pytest.importorskip("langchain_core.messages")
    model = langchain.ChatOpenAI(
        model=MODEL, base_url=demo_server.url + "/v1", api_key="-", temperature=0, max_tokens=8
    )
    answer = model.invoke("Who are you?")
    assert answer.content.startswith("I am the")
    assert "".join(c.content for c in model.stream("Who are you?")) == answer.content
    forced = model.bind_tools([TOOLS[0]], tool_choice="weather").invoke("Rain?", max_tokens=80)
    assert forced.tool_calls[0]["args"]["city"] in ("Ur", "Uz")
    structured = model.with_structured_output(Verse, method="json_schema")
    assert structured.invoke("Which?", max_tokens=60).book in ("Ruth", "Job")

    async def asynchronous():
        whole = await model.ainvoke("Who are you?")
        streamed = "".join([c.content async for c in model.astream("Who are you?")])
        return whole.content, streamed

    assert asyncio.run(asynchronous()) == (answer.content, answer.content)
    told = model.bind(logprobs=True, top_logprobs=2).invoke("Who are you?")
    entries = told.response_metadata["logprobs"]["content"]
    assert "".join(e["token"] for e in entries) == answer.content
    (several,) = model.generate([[messages.HumanMessage("Who are you?")]], n=2).generations
    assert [g.message.content for g in several] == [answer.content] * 2


def test_no_torch_was_loaded(demo_server):
    maps = Path(f"/proc/{demo_server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
