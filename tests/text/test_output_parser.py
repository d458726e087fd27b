"""Round trips: a template writes a conversation with calls into a prompt; what it wrote for the
assistant, fed to the parser of the formats the template chose, is the message again.
"""

import json

import pytest
from support import chat_templates, pieces

from jaxmoe.common.errors import ConfigError, RequestError
from jaxmoe.structured_output import StructuredOutput
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.deepseek_encoding import DeepSeekV4Encoding, DeepSeekV32Encoding
from jaxmoe.text.output_parser import MessageDelta, OutputFormats

SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What it is like outside.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
ARGUMENTS = [{"city": 'São "Paulo"\n', "days": [1, 2]}, {}]
CALLS = [
    {
        "id": f"functions.{name}:{i}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
    for i, (name, arguments) in enumerate(zip(("weather", "now"), ARGUMENTS, strict=True))
]
USER = [{"role": "system", "content": "S"}, {"role": "user", "content": "Weather?"}]
ANSWER = [{"role": "assistant", "content": "I look.", "tool_calls": CALLS}]
RESULTS = [{"role": "tool", "tool_call_id": CALLS[0]["id"], "content": "sunny"}]

ENCODINGS = {"DEEPSEEK_V32": DeepSeekV32Encoding(), "DEEPSEEK_V4": DeepSeekV4Encoding()}
FAMILIES = {
    # template: formats, and what ends the assistant's turn
    "DEEPSEEK_V3": ("deepseek_r1", "deepseek_v3", "<｜end▁of▁sentence｜>"),
    "DEEPSEEK_V31": ("deepseek_r1", "deepseek_v31", "<｜end▁of▁sentence｜>"),
    "DEEPSEEK_V32": ("deepseek_v4", "deepseek_v32", "<｜end▁of▁sentence｜>"),
    "DEEPSEEK_V4": ("deepseek_v4", "deepseek_v4", "<｜end▁of▁sentence｜>"),
    "QWEN3": ("qwen3", "hermes", "<|im_end|>"),
    "QWEN3_CODER": ("qwen3", "qwen3_coder", "<|im_end|>"),
    "KIMI_K2": ("kimi_k2", "kimi_k2", "<|im_end|>"),
}


def template(name):
    if name in ENCODINGS:
        return ChatTemplate(ENCODINGS[name])
    return ChatTemplate(getattr(chat_templates, name), SPECIAL)


def parse(parser, parts):
    """The whole message: (reasoning, content, [(id, name, arguments)])."""
    reasoning, content, calls = "", "", {}
    for delta in [*(parser.feed(p) for p in parts), parser.finish()]:
        reasoning, content = reasoning + delta.reasoning, content + delta.content
        for c in delta.tool_calls:
            old = calls.get(c.index, (None, None, ""))
            calls[c.index] = (old[0] or c.id, old[1] or c.name, old[2] + c.arguments)
    return reasoning, content, [calls[i] for i in sorted(calls)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_template_writes_is_parsed_back(name):
    reasoning, tools, end = FAMILIES[name]
    source = template(name)
    formats = OutputFormats.of(source.source)
    assert formats == OutputFormats(reasoning, tools)
    prompt = source.render(USER, tools=TOOLS)
    assert '"city"' in prompt and "weather" in prompt
    whole = source.render(USER + ANSWER, tools=TOOLS, add_generation_prompt=False)
    # What the template wrote for the assistant is what a model writes after the prompt.
    start = len(prompt)
    if not whole.startswith(prompt):
        start = len(source.render(USER, tools=TOOLS, add_generation_prompt=False))
        start += len("<｜Assistant｜></think>") if "｜" in end else 0
    written = whole[start:].rstrip("\n").removesuffix(end)
    for parts in pieces.splits(written, rounds=10):
        ids = iter("abc")
        parser = formats.parser(prompt, tools=TOOLS, make_id=lambda ids=ids: next(ids))
        _, content, calls = parse(parser, parts)
        assert content == "I look." and parser.num_tool_calls == 2
        assert [(c[1], json.loads(c[2])) for c in calls] == list(
            zip(("weather", "now"), ARGUMENTS, strict=True)
        )
        if name == "KIMI_K2":
            assert [c[0] for c in calls] == [c["id"] for c in CALLS]
        else:
            assert [c[0] for c in calls] == ["a", "b"]


@pytest.mark.parametrize("name", FAMILIES)
def test_results_come_back_into_the_prompt(name):
    """Arguments arrive as JSON text and are rendered as such, never as Python prints them."""
    text = template(name).render(USER + ANSWER + RESULTS, tools=TOOLS)
    assert "sunny" in text and "'city'" not in text and "I look." in text
    # The last turn is the tools', and the assistant is asked to go on.
    assert text.rindex("sunny") > text.rindex("São")


def test_arguments_that_are_no_object_stay_text():
    call = {"function": {"name": "f", "arguments": "{broken"}}
    messages = [*USER, {"role": "assistant", "tool_calls": [call]}]
    assert '"arguments": {broken}' in template("QWEN3").render(messages)
    assert "<｜tool▁sep｜>{broken<" in template("DEEPSEEK_V31").render(messages)
    with pytest.raises(RequestError, match="chat template refused"):
        template("QWEN3_CODER").render(messages)
    empty = {"function": {"name": "f", "arguments": ""}}
    messages = [*USER, {"role": "assistant", "tool_calls": [empty]}]
    assert '"arguments": {}}' in template("QWEN3").render(messages)


@pytest.mark.parametrize(
    "calls,words",
    [
        ("x", "tool_calls: got 'x', wanted a list"),
        ([1], r"tool_calls\[0\]: got 1"),
        ([{"function": {"arguments": "{}"}}], "wanted a function with a name"),
        ([{"function": {"name": "f", "arguments": [1]}}], "wanted JSON text"),
    ],
)
def test_bad_calls_in_the_history(calls, words):
    messages = [*USER, {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(RequestError, match=words):
        template("QWEN3").render(messages)


@pytest.mark.parametrize(
    "name,switches,tools,written,want",
    [
        ("DEEPSEEK_V31", {"thinking": True}, None, "Hm.\n</think>Hi", ("Hm.", "Hi", [])),
        ("DEEPSEEK_V31", {"thinking": False}, None, "Hi <think>", ("", "Hi <think>", [])),
        ("DEEPSEEK_V4", {}, None, "Hm.</think>Hi", ("Hm.", "Hi", [])),
        ("DEEPSEEK_V4", {"reasoning_effort": "none"}, None, "Hi", ("", "Hi", [])),
        ("DEEPSEEK_V32", {}, None, "Hi", ("", "Hi", [])),
        (
            "DEEPSEEK_V4",
            {},
            TOOLS,
            'Hm.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
            "</｜DSML｜tool_calls>",
            ("Hm.", "", [("a", "now", "{}")]),
        ),
        ("QWEN3", {}, None, "<think>\nHm.\n</think>\n\nHi", ("Hm.", "Hi", [])),
        ("QWEN3", {"enable_thinking": False}, None, "Hi", ("", "Hi", [])),
        (
            "QWEN3",
            {},
            TOOLS,
            '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
            ("Hm.", "", [("a", "now", "{}")]),
        ),
        # Without tools in the request, calls are content.
        ("QWEN3", {}, None, '<tool_call>{"name": "now"}</tool_call>',
         ("", '<tool_call>{"name": "now"}</tool_call>', [])),
        (
            "KIMI_K2",
            {},
            TOOLS,
            "<think>Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.now:3"
            "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            ("Hm.", "", [("functions.now:3", "now", "{}")]),
        ),
    ],
)  # fmt: skip
def test_thoughts_by_the_templates_switches(name, switches, tools, written, want):
    source = template(name)
    prompt = source.render(USER, tools=tools, **switches)
    for parts in pieces.splits(written, rounds=10):
        parser = OutputFormats.of(source.source).parser(prompt, tools=tools, make_id=lambda: "a")
        assert parse(parser, parts) == want


def test_thoughts_can_stay_in_the_content():
    formats = OutputFormats("qwen3", None)
    parser = formats.parser("", split_reasoning=False)
    assert parse(parser, ["<think>a</think>b"]) == ("", "<think>a</think>b", [])
    assert not parser.thinking and parser.num_tool_calls == 0
    assert formats.parser("<think>").thinking
    assert not MessageDelta() and MessageDelta(content="x")


def test_formats_can_be_told():
    assert OutputFormats.of(None) == OutputFormats()
    told = OutputFormats.of(None, reasoning="qwen3", tools="hermes")
    assert told == OutputFormats("qwen3", "hermes")
    none = OutputFormats.of(chat_templates.QWEN3, reasoning="none", tools="none")
    assert none == OutputFormats()
    with pytest.raises(ConfigError, match="reasoning format: got 'x'"):
        OutputFormats.of(None, reasoning="x")
    with pytest.raises(ConfigError, match="tool format: got 'x'"):
        OutputFormats.of(None, tools="x")


@pytest.mark.parametrize(
    "reasoning,prompt,continued,thoughts,begins",
    [
        (None, "<think>", "", None, False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", "", ("<think>", "</think>"), True),
        ("qwen3", "<|im_start|>assistant\n", "", ("<think>", "</think>"), False),
        ("qwen3", "<think>\n\n</think>\n\n", "", None, False),
        ("qwen3", "<|im_start|>assistant\nSo", "So", None, False),
        ("deepseek_r1", "<｜Assistant｜></think>", "", None, False),
    ],
)
def test_grammars_apply_after_the_thoughts(reasoning, prompt, continued, thoughts, begins):
    spec = StructuredOutput.json_object()
    got = OutputFormats(reasoning).after_thoughts(spec, prompt, continued)
    assert (got.thoughts, got.begins_in_thoughts) == (thoughts, begins)
