"""/v1/responses: items and events, and how its input becomes a conversation."""

import pytest
from support.front import run, serving

PATH = "/v1/responses"
ASK = {"input": "hi", "temperature": 0}
TOOLS = [{"type": "function", "name": n, "parameters": {"type": "object"}} for n in ("f", "g")]
WRITTEN = (
    b"<think>\nwell</think>\n\nok"
    b'<tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n</tool_call>'
    b'<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


def test_items_and_their_events():
    async def test():
        async with serving(lambda prompt: WRITTEN) as f:
            body = {**ASK, "tools": TOOLS, "instructions": "be", "metadata": {"a": "b"}}
            answer = (await f.post(PATH, body)).json()
            kinds = ["reasoning", "message", "function_call", "function_call"]
            assert [i["type"] for i in answer["output"]] == kinds
            reasoning, message, first, second = answer["output"]
            assert reasoning["content"][0]["text"] == "well"
            assert message["content"][0]["text"] == "ok"
            assert (first["name"], first["arguments"]) == ("f", '{"x": [1, 2]}')
            assert first["call_id"] != second["call_id"]
            assert (answer["status"], answer["object"]) == ("completed", "response")
            assert answer["instructions"] == "be" and answer["metadata"] == {"a": "b"}
            assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0

            events = await f.events(PATH, {**body, "stream": True})
            assert [v["sequence_number"] for _, v in events] == list(range(len(events)))
            assert all(name == v["type"] for name, v in events)
            names = [name for name, _ in events]
            assert names[:2] == ["response.created", "response.in_progress"]
            assert names[-1] == "response.completed"
            assert names.count("response.output_item.added") == 4
            assert names.count("response.output_item.done") == 4
            text = "".join(v["delta"] for n, v in events if n == "response.output_text.delta")
            assert text == "ok"
            parts = [v for n, v in events if n == "response.function_call_arguments.delta"]
            first_call = "".join(p["delta"] for p in parts if p["output_index"] == 2)
            assert first_call == '{"x": [1, 2]}'
            final = events[-1][1]["response"]["output"]
            assert [i["type"] for i in final] == kinds

    run(test())


def test_prompts():
    seen = []

    def script(prompt):
        seen.append(prompt.decode())
        return b"x"

    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
    shown = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    cases = [
        ({"instructions": "be"}, "s:be|u:hi|a:"),
        ({"input": [{"role": "developer", "content": "be"}]}, "s:be|a:"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
            "u:hi|a:",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "reasoning", "id": "r", "summary": []},
                    {"type": "message", "role": "assistant", "content": "so"},
                    call,
                    {"type": "function_call_output", "call_id": "c1", "output": "r"},
                ]
            },
            f"u:hi|a:so{shown}|t:r|a:",
        ),
        ({"reasoning": {"effort": "high"}}, "u:hi|a:<think>"),
    ]

    async def test():
        async with serving(script) as f:
            for change, prompt in cases:
                r = await f.post(PATH, {**ASK, **change})
                assert r.status_code == 200 and seen[-1] == prompt, (r.text, change)

    run(test())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_wrong_is_named(change, words):
    async def test():
        async with serving() as f:
            r = await f.post(PATH, {**ASK, **change})
            assert r.status_code == 400 and words in r.json()["error"]["message"], r.text

    run(test())


def test_an_error_in_a_stream_is_a_failed_response():
    async def test():
        async with serving(lambda prompt: b"abc", dies=True) as f:
            f.gate.close()
            async with f.client.stream("POST", PATH, json={**ASK, "stream": True}) as r:
                f.step.fail_with = RuntimeError("out of order")
                f.gate.open()
                text = (await r.aread()).decode()
            assert "response.failed" in text and "out of order" in text

    run(test())


@pytest.mark.parametrize(
    "written, text",
    [
        ("né€ x", "né€ x"),
        ("a <b> </tool", "a <b> </tool"),
        ("<think>\nwell</think>\n\né<ok", "é<ok"),
        ('\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', ""),
    ],
)
def test_logprobs_of_tokens_whose_text_comes_later(written, text):
    async def test():
        async with serving(lambda prompt: written.encode()) as f:
            body = {**ASK, "top_logprobs": 1, "include": ["message.output_text.logprobs"]}
            body |= {"tools": TOOLS}
            events = await f.events(PATH, {**body, "stream": True})
            deltas = [v for n, v in events if n == "response.output_text.delta"]
            assert "".join(d["delta"] for d in deltas) == text
            in_stream = [e for d in deltas for e in d["logprobs"]]
            answer = (await f.post(PATH, body)).json()
            messages = [i for i in answer["output"] if i["type"] == "message"]
            whole = [e for i in messages for e in i["content"][0]["logprobs"]]
            for entries in (in_stream, whole):
                assert bytes(b for e in entries for b in e["bytes"]).decode() == text

    run(test())
