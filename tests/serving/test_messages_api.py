"""/v1/messages: Anthropic's blocks and events, and how its input becomes a conversation."""

import json

import pytest
from support.front import run, serving

from jaxmoe.serving import anthropic_input

PATH = "/v1/messages"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "temperature": 0}
TOOLS = [{"name": n, "input_schema": {"type": "object"}} for n in ("f", "g")]
WRITTEN = (
    b"<think>\nwell</think>\n\nok"
    b'<tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n</tool_call>'
    b'<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


def replay(events):
    """The blocks that a client makes of the events; fails where their order is wrong."""
    blocks, open_at = [], None
    for name, value in events:
        assert name == value["type"]
        if name == "content_block_start":
            assert open_at is None and value["index"] == len(blocks)
            blocks.append(dict(value["content_block"]))
            open_at = value["index"]
        elif name == "content_block_delta":
            assert value["index"] == open_at
            delta = value["delta"]
            key = {"thinking_delta": "thinking", "text_delta": "text"}.get(delta["type"])
            if key:
                blocks[open_at][key] += delta[key]
            elif delta["type"] == "input_json_delta":
                blocks[open_at].setdefault("json", "")
                blocks[open_at]["json"] += delta["partial_json"]
            else:
                assert delta["type"] == "signature_delta"
        elif name == "content_block_stop":
            assert value["index"] == open_at
            open_at = None
    assert open_at is None
    return blocks


def test_thoughts_text_and_calls_are_blocks():
    async def test():
        async with serving(lambda prompt: WRITTEN) as f:
            body = {**ASK, "tools": TOOLS}
            answer = (await f.post(PATH, body)).json()
            assert [b["type"] for b in answer["content"]] == [
                "thinking",
                "text",
                "tool_use",
                "tool_use",
            ]
            thinking, text, first, second = answer["content"]
            assert (thinking["thinking"], text["text"]) == ("well", "ok")
            assert (first["name"], first["input"]) == ("f", {"x": [1, 2]})
            assert (second["name"], second["input"]) == ("g", {})
            assert answer["stop_reason"] == "tool_use" and answer["type"] == "message"
            usage = answer["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 5

            events = await f.events(PATH, {**body, "stream": True})
            assert [events[0][0], events[1][0]] == ["message_start", "ping"]
            assert [events[-2][0], events[-1][0]] == ["message_delta", "message_stop"]
            assert events[-2][1]["delta"]["stop_reason"] == "tool_use"
            assert events[-2][1]["usage"]["output_tokens"] == usage["output_tokens"]
            blocks = replay(events)
            assert [b["type"] for b in blocks] == [b["type"] for b in answer["content"]]
            assert (blocks[0]["thinking"], blocks[1]["text"]) == ("well", "ok")
            assert json.loads(blocks[2]["json"]) == {"x": [1, 2]}

    run(test())


def test_ends():
    async def test():
        async with serving(lambda prompt: b"abcdef") as f:
            cases = [
                ({}, "end_turn", None, "abcdef"),
                ({"max_tokens": 3}, "max_tokens", None, "abc"),
                ({"stop_sequences": ["de", "zz"]}, "stop_sequence", "de", "abc"),
            ]
            for change, reason, sequence, text in cases:
                answer = (await f.post(PATH, {**ASK, **change})).json()
                assert answer["content"][0]["text"] == text
                assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
                events = await f.events(PATH, {**ASK, **change, "stream": True})
                assert events[-2][1]["delta"]["stop_reason"] == reason

    run(test())


def test_prompts():
    seen = []

    def script(prompt):
        seen.append(prompt.decode())
        return b"x"

    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1"}
    cases = [
        ({"system": "be"}, "s:be|u:hi|a:"),
        (
            {
                "system": [
                    {"type": "text", "text": "x-anthropic-billing-header: cch=123;"},
                    {"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}},
                ]
            },
            "s:be|u:hi|a:",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "u:hi|a:<think>"),
        ({"thinking": {"type": "disabled"}}, "u:hi|a:"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "We"}]}, "u:hi|a:We"),
        (
            {
                "messages": [
                    *ASK["messages"],
                    {"role": "assistant", "content": [{"type": "text", "text": "so"}, use]},
                    {
                        "role": "user",
                        "content": [
                            {**result, "content": [{"type": "text", "text": "r"}]},
                            {"type": "text", "text": "and?"},
                        ],
                    },
                ]
            },
            'u:hi|a:so<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>|t:r|u:and?|a:',
        ),
    ]

    async def test():
        async with serving(script) as f:
            for change, prompt in cases:
                r = await f.post(PATH, {**ASK, **change})
                assert r.status_code == 200 and seen[-1] == prompt, (r.text, change)
                count = {k: v for k, v in {**ASK, **change}.items() if k != "max_tokens"}
                r = await f.post(PATH + "/count_tokens", count)
                assert r.json()["input_tokens"] >= len(prompt.removesuffix("We"))

    run(test())


def test_the_billing_header_is_all_that_is_taken_out():
    text = "x-anthropic-billing-header: a=1\nYou are"
    assert anthropic_input.check_system("system", text) == "You are"
    assert anthropic_input.check_system("system", "a\nb") == "a\nb"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "tools[0].type"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"thinking": {"type": "maybe"}}, "thinking"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
    ],
)
def test_what_is_wrong_is_named_in_anthropics_shape(change, words):
    async def test():
        async with serving() as f:
            r = await f.post(PATH, {**ASK, **change})
            body = r.json()
            assert r.status_code == 400 and body["type"] == "error"
            assert body["error"]["type"] == "invalid_request_error"
            assert words in body["error"]["message"]
            assert body["request_id"] == r.headers["request-id"]

    run(test())


def test_an_error_in_a_stream_is_an_event():
    async def test():
        async with serving(lambda prompt: b"abc", dies=True) as f:
            f.gate.close()
            async with f.client.stream("POST", PATH, json={**ASK, "stream": True}) as r:
                f.step.fail_with = RuntimeError("out of order")
                f.gate.open()
                text = (await r.aread()).decode()
            assert "event: error\n" in text and "overloaded_error" in text

    run(test())
