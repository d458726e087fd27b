"""/v1/chat/completions: the shape of answers and streams, and what is refused."""

import pytest
from support.front import run, serving

from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.serving.timings import prompt_progress
from jaxmoe.text.deepseek_encoding import DeepSeekV4Encoding

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def test_an_answer_has_openais_shape():
    async def test():
        async with serving(lambda prompt: b"You said " + prompt[2:4]) as f:
            r = await f.post(CHAT, ASK)
            body = r.json()
            assert r.status_code == 200 and body["object"] == "chat.completion"
            assert body["id"].startswith("chatcmpl-") and body["model"] == "fake"
            (choice,) = body["choices"]
            message = {"role": "assistant", "content": "You said hi", "refusal": None}
            assert choice["message"] == message
            assert choice["logprobs"] is None and choice["finish_reason"] == "stop"
            usage = body["usage"]  # the prompt is "u:hi|a:", and end of text is a token too
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 12)
            assert usage["total_tokens"] == 19
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    run(test())


def test_a_stream_follows_the_rules():
    async def test():
        async with serving(lambda prompt: b"abc") as f:
            body = {**ASK, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
            events = [v for _, v in await f.events(CHAT, body)]
            assert events.pop() == "[DONE]"
            assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1
            assert {e["object"] for e in events} == {"chat.completion.chunk"}
            last = events.pop()
            assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
            assert all("usage" not in e for e in events)
            for index in (0, 1):
                chunks = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
                assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
                assert all("role" not in c["delta"] for c in chunks[1:])
                assert "".join(c["delta"].get("content", "") for c in chunks) == "abc"
                reasons = [c["finish_reason"] for c in chunks]
                assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}

    run(test())


def test_the_last_text_and_the_reason_come_together():
    async def test():
        async with serving(lambda prompt: b"abcdef") as f:
            events = await f.events(CHAT, {**ASK, "stream": True, "max_tokens": 3})
            last = events[-2][1]["choices"][0]
            assert last["delta"] == {"content": "c"} and last["finish_reason"] == "length"
            body = {**ASK, "stream": True, "stop": "ef", "stream_options": None}
            events = await f.events(CHAT, body)
            texts = [e["choices"][0]["delta"].get("content") for _, e in events[:-1]]
            assert "".join(t or "" for t in texts) == "abcd" and "e" not in texts

    run(test())


def test_no_half_characters_and_logprobs_join_to_the_text():
    text = "né 👩‍👩‍👧 ß"

    async def test():
        async with serving(lambda prompt: text.encode()) as f:
            body = {**ASK, "logprobs": True, "top_logprobs": 2}
            choice = (await f.post(CHAT, body)).json()["choices"][0]
            assert choice["message"]["content"] == text
            raw = b"".join(bytes(t["bytes"]) for t in choice["logprobs"]["content"])
            assert raw.decode() == text
            assert all(len(t["top_logprobs"]) == 2 for t in choice["logprobs"]["content"])
            events = await f.events(CHAT, {**body, "stream": True})
            chunks = [e["choices"][0] for _, e in events[:-1]]
            texts = [c["delta"].get("content", "") for c in chunks]
            assert "".join(texts) == text and not any("\ufffd" in t for t in texts)
            entries = [t for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]]
            assert b"".join(bytes(t["bytes"]) for t in entries).decode() == text

    run(test())


def test_thoughts_and_calls_are_parsed_in_streams_and_answers():
    written = (
        b"<think>\nwell</think>\n\nok"
        b'<tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n</tool_call>'
        b'<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )
    tools = [{"type": "function", "function": {"name": n}} for n in ("f", "g")]

    async def test():
        async with serving(lambda prompt: written) as f:
            body = {**ASK, "tools": tools}
            answer = (await f.post(CHAT, body)).json()
            choice = answer["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            message = choice["message"]
            assert message["reasoning_content"] == "well" and message["content"] == "ok"
            calls = message["tool_calls"]
            assert [c["function"]["name"] for c in calls] == ["f", "g"]
            assert calls[0]["function"]["arguments"] == '{"x": [1, 2]}'
            assert calls[0]["type"] == "function" and calls[0]["id"] != calls[1]["id"]
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 10

            events = await f.events(CHAT, {**body, "stream": True})
            deltas = [e["choices"][0]["delta"] for _, e in events[:-1]]
            assert "".join(d.get("reasoning_content", "") for d in deltas) == "well"
            assert "".join(d.get("content") or "" for d in deltas) == "ok"
            parts = [c for d in deltas for c in d.get("tool_calls", ())]
            heads = [c for c in parts if "id" in c]
            assert [(c["index"], c["function"]["name"]) for c in heads] == [(0, "f"), (1, "g")]
            first = "".join(c["function"]["arguments"] for c in parts if c["index"] == 0)
            assert first == '{"x": [1, 2]}'
            assert events[-2][1]["choices"][0]["finish_reason"] == "tool_calls"

            # Without tools, or with tool_choice none, calls are text; thoughts can be left out.
            plain = (await f.post(CHAT, {**body, "tool_choice": "none"})).json()["choices"][0]
            assert "<tool_call>" in plain["message"]["content"]
            assert plain["finish_reason"] == "stop"
            short = (await f.post(CHAT, {**body, "include_reasoning": False})).json()
            assert "reasoning_content" not in short["choices"][0]["message"]

    run(test())


def test_prompts_are_rendered_as_asked():
    seen = []

    def script(prompt):
        seen.append(prompt.decode())
        return b"x"

    cases = [
        ({}, "u:hi|a:"),
        ({"add_generation_prompt": False}, "u:hi|"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "u:hi|a:<think>"),
        ({"reasoning_effort": "low"}, "u:hi|a:<think>"),
        ({"reasoning_effort": "none"}, "u:hi|a:"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "T:f,|u:hi|a:"),
        ({"truncate_prompt_tokens": 3}, "|a:"),
        (
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "be"}]},
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "Well, "},
                ],
                "continue_final_message": True,
            },
            "s:be|u:hi|a:Well,",
        ),
    ]

    async def test():
        async with serving(script) as f:
            for change, prompt in cases:
                r = await f.post(CHAT, {**ASK, **change})
                assert r.status_code == 200 and seen[-1] == prompt, (r.text, change)

    run(test())


@pytest.mark.parametrize("content", ["<", "|", "end", "Well|>", "im", "\ue000"])
def test_a_continued_message_may_look_like_the_mark_after_it(content):
    seen = []

    def script(prompt):
        seen.append(prompt.decode())
        return b"x"

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    messages = [*ASK["messages"], {"role": "assistant", "content": content}]

    async def test():
        async with serving(script, template=template) as f:
            r = await f.post(CHAT, {**ASK, "messages": messages, "continue_final_message": True})
            assert r.status_code == 200, r.text
            assert seen[-1].endswith(f"<|im_end|>\n<|im_start|>assistant\n{content}")

    run(test())


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}|{% endfor %}",
        "{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}|{% endfor %}",
    ],
)
def test_a_message_that_the_template_changes_is_not_continued(template):
    messages = [*ASK["messages"], {"role": "assistant", "content": "Well"}]

    async def test():
        async with serving(template=template) as f:
            r = await f.post(CHAT, {**ASK, "messages": messages, "continue_final_message": True})
            assert r.status_code == 400 and "continue_final_message" in r.text

    run(test())


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"n": 129}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"max_tokens": 4000}, None),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
    ],
)
def test_what_is_wrong_is_named(change, param):
    async def test():
        async with serving() as f:
            r = await f.post(CHAT, {**ASK, **change})
            error = r.json()["error"]
            assert r.status_code == 400 and error["type"] == "invalid_request_error"
            if param is not None:
                assert error["param"].startswith(param) and param in error["message"]
            if change.get("max_tokens") == 4000 or "x" * 500 in str(change):
                assert error["code"] == "context_length_exceeded" and "400" in error["message"]

    run(test())


def test_unknown_models_are_404_and_unknown_fields_are_taken(caplog):
    async def test():
        async with serving() as f:
            r = await f.post(CHAT, {**ASK, "model": "gpt-4"})
            assert r.status_code == 404 and r.json()["error"]["code"] == "model_not_found"
            for _ in range(2):
                assert (await f.post(CHAT, {**ASK, "model": "fake", "xyz": 1})).status_code == 200
        async with serving(served_model_name="a,b,*") as f:
            r = await f.post(CHAT, {**ASK, "model": "gpt-4"})
            assert r.status_code == 200 and r.json()["model"] == "a"

    run(test())
    assert sum("'xyz'" in m for m in caplog.messages) == 1


def test_an_error_before_the_first_byte_is_a_status_and_after_it_an_event():
    async def test():
        async with serving(lambda prompt: b"abcdef", dies=True) as f:
            f.gate.close()
            request = f.client.stream("POST", CHAT, json={**ASK, "stream": True})
            async with request as r:
                assert r.status_code == 200
                f.step.fail_with = RuntimeError("out of order")
                f.gate.open()
                text = (await r.aread()).decode()
            assert "out of order" in text and text.endswith("data: [DONE]\n\n")
            assert '"error"' in text
            r = await f.post(CHAT, {**ASK, "stream": True})
            assert r.status_code == 503 and r.json()["error"]["code"] == "engine_down"
            assert (await f.client.get("/health")).status_code == 503

    run(test())


def test_silence_is_filled_with_comments():
    async def test():
        async with serving(lambda prompt: b"ab", ping_interval_s=0.05) as f:
            f.gate.close()
            seen = b""
            async with f.client.stream("POST", CHAT, json={**ASK, "stream": True}) as r:
                async for piece in r.aiter_bytes():
                    seen += piece
                    if seen.count(b": ping\n\n") >= 2:
                        f.gate.open()
            # The role chunk is there before anything is computed.
            assert seen.index(b'"role"') < seen.index(b": ping\n\n")
            assert seen.endswith(b"data: [DONE]\n\n")

    run(test())


def test_prefill_progress_on_request():
    async def test():
        async with serving(lambda prompt: b"ab") as f:
            ask = {"messages": [{"role": "user", "content": "x" * 60}], "stream": True}
            events = await f.events(CHAT, {**ask, "return_progress": True})
            progress = [e["prompt_progress"] for _, e in events[:-1] if "prompt_progress" in e]
            assert progress[-1] == {"total": 65, "processed": 65}
            assert [p["processed"] for p in progress] == sorted(p["processed"] for p in progress)

    run(test())


def test_a_streamed_prompts_progress_has_its_layer_and_the_time_left():
    assert prompt_progress(PrefillProgress("r", 300, 4000, 3, 61, 8.5)) == {
        "total": 4000,
        "processed": 300,
        "layer": 3,
        "layers": 61,
        "left_ms": 8500.0,
    }


def test_token_ids_and_timings_on_request():
    async def test():
        async with serving(lambda prompt: b"ab") as f:
            body = {**ASK, "return_token_ids": True, "timings": True}
            answer = (await f.post(CHAT, body)).json()
            assert answer["prompt_token_ids"] == list(b"u:hi|a:")
            assert answer["choices"][0]["token_ids"] == [97, 98, 1]
            assert answer["timings"]["prompt_n"] == 7 and answer["timings"]["predicted_n"] == 3
            events = [e for _, e in (await f.events(CHAT, {**body, "stream": True}))[:-1]]
            ids = [i for e in events for c in e["choices"] for i in c.get("token_ids", ())]
            assert ids == [97, 98, 1] and events[-1]["timings"]["predicted_n"] == 3

    run(test())


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "change",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"regex": r"\{\"a\": [0-9]+\}"}},
        {"structured_outputs": {"choice": ['{"a": 12}', "other"]}},
        {"structured_outputs": {"grammar": 'start: "{\\"a\\": 12}"'}},
    ],
)
def test_forms_reach_the_engine(change):
    """The fake step takes no masks, so it is given what the grammar allows; the constraint ends the
    text, which goes on otherwise.
    """

    async def test():
        async with serving(lambda prompt: b'{"a": 12}' + b"x" * 5) as f:
            r = await f.post(CHAT, {**ASK, **change})
            assert r.status_code == 200, r.text
            choice = r.json()["choices"][0]
            assert choice["message"]["content"] == '{"a": 12}'
            assert choice["finish_reason"] == "stop"

    run(test())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"structured_outputs": {"regex": "(((("}}, "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "grammar"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "no such type"}},
                }
            },
            "",
        ),
    ],
)
def test_forms_that_are_none_are_400(change, words):
    async def test():
        async with serving() as f:
            r = await f.post(CHAT, {**ASK, **change})
            assert r.status_code == 400, r.text
            assert words in r.json()["error"]["message"]
            assert (await f.post(CHAT, ASK)).status_code == 200

    run(test())


TOOLS = [
    {
        "type": "function",
        "function": {"name": n, "parameters": {"type": "object", "properties": {}}},
    }
    for n in ("f", "g")
]


@pytest.mark.parametrize(
    "choice, written, names",
    [
        ("required", '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', ["g"]),
        (
            {"type": "function", "function": {"name": "f"}},
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            ["f"],
        ),
    ],
)
def test_forced_calls_are_constrained(choice, written, names):
    async def test():
        async with serving(lambda prompt: written.encode() + b"more") as f:
            body = {**ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
            r = await f.post(CHAT, body)
            assert r.status_code == 200, r.text
            got = r.json()["choices"][0]
            assert [c["function"]["name"] for c in got["message"]["tool_calls"]] == names
            assert got["finish_reason"] == "tool_calls" and not got["message"]["content"]

    run(test())


def test_an_encoding_is_served_as_a_template_is():
    seen, bos = [], "<｜begin▁of▁sentence｜>"
    block = (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    calls = f"\n\n{block}"
    script = [f"well</think>ok{calls}"]

    def write(prompt):
        seen.append(prompt.decode())
        return script[0].encode()

    parts = [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    async def test():
        encoding = DeepSeekV4Encoding()
        async with serving(write, template=encoding, max_model_len=3000) as f:
            body = {**ASK, "reasoning_effort": "low"}
            choice = (await f.post(CHAT, {**body, "tools": TOOLS})).json()["choices"][0]
            message = choice["message"]
            assert (message["reasoning_content"], message["content"]) == ("well", "ok")
            assert [c["function"]["name"] for c in message["tool_calls"]] == ["g"]
            assert (
                "### Available Tool Schemas" in seen[-1] and choice["finish_reason"] == "tool_calls"
            )

            script[0] = calls
            forced = {**body, "tools": TOOLS, "tool_choice": "required", "reasoning_effort": "none"}
            r = await f.post(CHAT, {**forced, "parallel_tool_calls": False})
            assert [c["function"]["name"] for c in r.json()["choices"][0]["message"]["tool_calls"]]

            script[0] = "done</think>{}"
            await f.post(CHAT, {**body, "messages": [{"role": "user", "content": parts}]})
            assert seen[-1] == f"{bos}<｜User｜>p\n\nq<｜Assistant｜><think>"
            asked = [{"role": "user", "content": "hi", "task": "title"}]
            await f.post(CHAT, {**body, "messages": asked})
            assert seen[-1] == f"{bos}<｜User｜>hi<｜title｜>"
            r = await f.post(CHAT, {**body, "response_format": form})
            assert r.json()["choices"][0]["message"]["content"] == "{}"
            assert "## Response Format:" in seen[-1] and '"additionalProperties": false' in seen[-1]
            r = await f.post(CHAT, {**body, "messages": [{**asked[0], "task": "poem"}]})
            assert r.status_code == 400 and "read_url" in r.text
            wrong = [{"role": "user", "content": parts}]
            r = await f.post(CHAT, {**ASK, "messages": wrong, "continue_final_message": True})
            assert r.status_code == 400 and "continue_final_message" in r.text

    run(test())
