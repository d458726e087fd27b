"""Every case is fed in every possible cut: what comes out does not depend on it."""

import json
import random

import pytest
from support import pieces

from jaxmoe.common.errors import ConfigError
from jaxmoe.text.tool_calls import (
    MAX_HEAD_CHARS,
    TOOL_FORMATS,
    choose_tool_format,
    make_tool_parser,
    new_call_id,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "mode": {"type": "integer"},
                    "lines": {"type": "array", "items": {"type": "string"}},
                    "force": {"type": "boolean"},
                    "owner": {"type": ["string", "null"]},
                    "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                    "any": {},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def collect(format, parts):
    """Content and calls [(id, name, arguments)], checking the deltas' form on the way."""
    ids = iter(f"id{i}" for i in range(100))
    parser = make_tool_parser(format, TOOLS, lambda: next(ids))
    content, calls = "", []
    for delta in [*(parser.feed(p) for p in parts), parser.finish()]:
        content += delta.content
        assert len({c.index for c in delta.calls}) == len(delta.calls)
        for c in delta.calls:
            if c.index == len(calls):
                assert c.id and c.name
                calls.append([c.id, c.name, c.arguments])
            else:
                assert c.index == len(calls) - 1 and c.id is None and c.name is None
                assert c.arguments
                calls[-1][2] += c.arguments
    assert parser.num_calls == len(calls)
    return content, [tuple(c) for c in calls]


def ds(name):
    return f"<｜tool▁{name}｜>"


BEGIN, END, CALL, DONE, SEP = (
    ds(n) for n in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
K_BEGIN, K_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
K_CALL, K_ARGS, K_DONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ARGS = '{"city": "Paris \\"{[<\\\\", "n": [1, {"a": "é🙂"}]}'
MARKS_AS_TEXT = f'{{"a": "{DONE}{END}"}}'


def v3(name, args):
    return f"{CALL}function{SEP}{name}\n```json\n{args}\n```{DONE}"


def v31(name, args):
    return f"{CALL}{name}{SEP}{args}{DONE}"


def k2(head, args):
    return f"{K_CALL}{head}{K_ARGS}{args}{K_DONE}"


def hermes(name, args):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>'


def coder(name, *parameters):
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def dsml(block, *calls):
    inner = "".join(
        f'<{DSML}invoke name="{name}">\n'
        + "".join(f"<{DSML}parameter {head}>{v}</{DSML}parameter>\n" for head, v in parameters)
        + f"</{DSML}invoke>\n"
        for name, *parameters in calls
    )
    return f"<{DSML}{block}>\n{inner}</{DSML}{block}>"


DSML = "｜DSML｜"
TEXT, JSON = 'string="true"', 'string="false"'
V4_CALL = f'<{DSML}tool_calls>\n<{DSML}invoke name="write">\n<{DSML}parameter name="path"'
DSML_CASES = [
    ("deepseek_v4", "a < b <｜D\n", "a < b <｜D\n", []),
    ("deepseek_v4", f"Hm.\n\n{dsml('tool_calls', ['now'])}", "Hm.", [("id0", "now", "{}")]),
    ("deepseek_v32", f"\n\n{dsml('function_calls', ['now'])}", "", [("id0", "now", "{}")]),
    # The other generation's block is no mark, but what is inside of it is.
    (
        "deepseek_v4",
        dsml("function_calls", ["now"]),
        f"<{DSML}function_calls></{DSML}function_calls>",
        [("id0", "now", "{}")],
    ),
    (
        "deepseek_v4",
        dsml(
            "tool_calls",
            ["write", (f'name="path" {TEXT}', ' "é"\n</b>\n'), (f'name="mode" {JSON}', "7")],
            ["write", (f'name="lines" {JSON}', '["a", 1.50]'), (f'name="x" {JSON}', "null")],
        ),
        "",
        [
            ("id0", "write", '{"path": " \\"é\\"\\n</b>\\n", "mode": 7}'),
            ("id1", "write", '{"lines": ["a", 1.5], "x": null}'),
        ],
    ),
    # Without the attribute, or with one that is neither, the schema says; what is no JSON is text.
    (
        "deepseek_v4",
        dsml("tool_calls", ["write", ('name="path"', "1"), ('name="mode" string="?"', "1")]),
        "",
        [("id0", "write", '{"path": "1", "mode": 1}')],
    ),
    (
        "deepseek_v4",
        dsml(
            "tool_calls", ["write", (f'name="force" {JSON}', "True"), (f'name="y" {JSON}', "a b")]
        ),
        "",
        [("id0", "write", '{"force": true, "y": "a b"}')],
    ),
    (
        "deepseek_v4",
        dsml("tool_calls", ["write", (f'name="a"b" {TEXT}', "1")]),
        "",
        [("id0", "write", '{"a\\"b": "1"}')],
    ),
    # Forgotten marks: of the block, and of a call before the next one.
    (
        "deepseek_v4",
        f'so <{DSML}invoke name="now">\n<{DSML}invoke name="now">\n</{DSML}invoke>',
        "so",
        [("id0", "now", "{}"), ("id1", "now", "{}")],
    ),
    # Cut off: a string goes as far as it came, half a number stays away.
    ("deepseek_v4", f"{V4_CALL} {TEXT}>ab", "", [("id0", "write", '{"path": "ab')]),
    (
        "deepseek_v4",
        f'<{DSML}invoke name="write">\n<{DSML}parameter name="mode" {JSON}>12',
        "",
        [("id0", "write", '{"mode": ')],
    ),
    # What is no call is content.
    ("deepseek_v4", f"<{DSML}tool_calls>\nnothing", f"<{DSML}tool_calls>\nnothing", []),
    ("deepseek_v4", f"a <{DSML}tool_calls>", f"a <{DSML}tool_calls>", []),
    ("deepseek_v4", f"<{DSML}invoke id=1>x", f"<{DSML}invoke id=1>x", []),
    (
        "deepseek_v4",
        dsml("tool_calls", ["now"]) + "\nand more",
        "and more",
        [("id0", "now", "{}")],
    ),
]
CASES = [
    *DSML_CASES,
    # format, text, content, calls
    ("deepseek_v3", "Just text, a < b.\n", "Just text, a < b.\n", []),
    ("deepseek_v3", f"Hm.\n\n{BEGIN}{v3('f', ARGS)}{END}", "Hm.", [("id0", "f", ARGS)]),
    (
        "deepseek_v3",
        f"{BEGIN}{v3('f', '{}')}\n{v3('g-2', ARGS)}{END}",
        "",
        [("id0", "f", "{}"), ("id1", "g-2", ARGS)],
    ),
    # No section mark, no code block, no closing marks.
    ("deepseek_v3", f"{CALL}function{SEP}f\n{{}}", "", [("id0", "f", "{}")]),
    ("deepseek_v3", f"{v3('f', '{}')} and more", "and more", [("id0", "f", "{}")]),
    # A kind that is not "function", and a name that is none, are content.
    ("deepseek_v3", f"{BEGIN}{CALL}x{SEP}f\n{{}}", f"{BEGIN}{CALL}x{SEP}f\n{{}}", []),
    (
        "deepseek_v3",
        f"{BEGIN}{CALL}function{SEP}two words\n{{}}",
        f"{BEGIN}{CALL}function{SEP}two words\n{{}}",
        [],
    ),
    ("deepseek_v3", f"{CALL}function{SEP}f\n```json\n```{DONE}", "", [("id0", "f", "{}")]),
    ("deepseek_v31", f"{BEGIN}{v31('f', ARGS)}{END}", "", [("id0", "f", ARGS)]),
    (
        "deepseek_v31",
        f"I look.{BEGIN}{v31('f', ARGS)}{v31('function', '{}')}{END}",
        "I look.",
        [("id0", "f", ARGS), ("id1", "function", "{}")],
    ),
    ("deepseek_v31", f"{BEGIN}{v31('f', '')}{END}", "", [("id0", "f", "{}")]),
    ("deepseek_v31", f"{BEGIN}{v31('f', '[1]')}", f"{BEGIN}{v31('f', '[1]')}", []),
    ("deepseek_v31", f"{BEGIN}nothing", f"{BEGIN}nothing", []),
    ("deepseek_v31", f"a {BEGIN}", f"a {BEGIN}", []),
    ("deepseek_v31", f"a {BEGIN[:7]}", f"a {BEGIN[:7]}", []),
    # The marks as text of a string of the arguments.
    ("deepseek_v31", v31("f", MARKS_AS_TEXT), "", [("id0", "f", MARKS_AS_TEXT)]),
    # Arguments that end early, or are followed by something.
    ("deepseek_v31", f'{BEGIN}{CALL}f{SEP}{{"a": [1', "", [("id0", "f", '{"a": [1')]),
    (
        "deepseek_v31",
        f'{BEGIN}{v31("f", "{1")}{v31("g", "{}")}{END}',
        "",
        [("id0", "f", "{1"), ("id1", "g", "{}")],
    ),
    ("deepseek_v31", f"{BEGIN}{v31('f', '{} oh')}{END}", "oh", [("id0", "f", "{}")]),
    ("deepseek_v31", f"{CALL}f{SEP}{{}}{END}x", "x", [("id0", "f", "{}")]),
    ("deepseek_v31", f"{CALL}f{SEP}{{}}{DONE[:6]}", "", [("id0", "f", "{}")]),
    ("deepseek_v31", f"{CALL}f{CALL}g{SEP}{{}}", f"{CALL}f", [("id0", "g", "{}")]),
    ("deepseek_v31", f"{v31('f', '{a<b}')}", "", [("id0", "f", "{a<b}")]),
    (
        "kimi_k2",
        f"Let me see.{K_BEGIN}{k2('functions.f:0', ARGS)}{k2('functions.g:1', '{}')}{K_END}",
        "Let me see.",
        [("functions.f:0", "f", ARGS), ("functions.g:1", "g", "{}")],
    ),
    ("kimi_k2", f"{K_BEGIN} {k2(' f:12 ', ARGS)} {K_END}", "", [("f:12", "f", ARGS)]),
    ("kimi_k2", f"{K_BEGIN}{k2('a.b', '{}')}{K_END}", "", [("id0", "a.b", "{}")]),
    ("kimi_k2", f"{K_BEGIN}{k2('functions.x', '{}')}{K_END}", "", [("id0", "x", "{}")]),
    ("kimi_k2", f"{K_BEGIN}{K_CALL}{K_ARGS}{{}}", f"{K_BEGIN}{K_CALL}{K_ARGS}{{}}", []),
    ("hermes", f"Well.\n{hermes('f', ARGS)}", "Well.", [("id0", "f", ARGS)]),
    (
        "hermes",
        f"{hermes('f', ARGS)}\n{hermes('g', '{}')}\n",
        "",
        [("id0", "f", ARGS), ("id1", "g", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>.', ".",
     [("id0", "f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("id0", "f", "{}")]),
    ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', "",
     [("id0", "f", '{"a":1}')]),
    ("hermes", '<tool_call>{"name":"f","arguments":{},"id":"7"}</tool_call>', "",
     [("id0", "f", "{}")]),
    ("hermes", hermes("f", '{"a": "</tool_call>"}'), "", [("id0", "f", '{"a": "</tool_call>"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>x', "x",
     [("id0", "f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a"', "", [("id0", "f", '{"a"')]),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", '<tool_call>\nf(x)</tool_call>', '<tool_call>\nf(x)</tool_call>', []),
    ("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    ("hermes", '<tool_call>{name}</tool_call>b', '<tool_call>{name}</tool_call>b', []),
    ("hermes", '<tool_call>{"a": 1</tool_call>b', '<tool_call>{"a": 1</tool_call>b', []),
    ("hermes", '<tool_call>{"a": <b', '<tool_call>{"a": <b', []),
    ("hermes", "an <tool", "an <tool", []),
    ("hermes", hermes("f", "{}")[:-3], "", [("id0", "f", "{}")]),
    ("qwen3_coder", coder("now"), "", [("id0", "now", "{}")]),
    (
        "qwen3_coder",
        "I write.\n"
        + coder("write", ("path", 'a"b\n</x>\n\n'), ("mode", "420"), ("force", "True")),
        "I write.",
        [("id0", "write", '{"path": "a\\"b\\n</x>\\n\\n", "mode": 420, "force": true}')],
    ),
    (
        "qwen3_coder",
        coder("write", ("owner", "null"), ("size", "1.5"), ("any", "[1, 2]"), ("lines", '["é"]')),
        "",
        [("id0", "write", '{"owner": null, "size": 1.5, "any": [1, 2], "lines": ["é"]}')],
    ),
    (
        "qwen3_coder",
        coder("write", ("owner", "5"), ("any", "x y"), ("new", "1"), ("mode", "many")),
        "",
        [("id0", "write", '{"owner": "5", "any": "x y", "new": "1", "mode": "many"}')],
    ),
    ("qwen3_coder", coder("write", ("path", "")) + coder("now"), "",
     [("id0", "write", '{"path": ""}'), ("id1", "now", "{}")]),
    ("qwen3_coder", "So <function=now>\n</function>\n</tool_call>", "So", [("id0", "now", "{}")]),
    ("qwen3_coder", "So <function=other>", "So <function=other>", []),
    ("qwen3_coder", "<tool_call>\nhm </tool_call>", "<tool_call>\nhm </tool_call>", []),
    ("qwen3_coder", "<tool_call>\n<function=now", "<tool_call>\n<function=now", []),
    ("qwen3_coder", "<tool_call><function=a\nb>", "<tool_call><function=a\nb>", []),
    ("qwen3_coder", "<tool_call><function=now></tool_call>ok", "ok", [("id0", "now", "{}")]),
    ("qwen3_coder", "<tool_call><function=write><parameter=path>\nab\n</par", "",
     [("id0", "write", '{"path": "ab\\n</par')]),
    ("qwen3_coder", "<tool_call><function=write><parameter=mode>\n12", "",
     [("id0", "write", '{"mode": ')]),
    ("qwen3_coder", "<tool_call><function=now>text</function>", "text</function>",
     [("id0", "now", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize("format,text,content,calls", CASES)
def test_content_and_calls_in_every_cut(format, text, content, calls):
    for parts in pieces.splits(text, rounds=10):
        assert collect(format, parts) == (content, calls), parts


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_rubbish_never_raises_and_cuts_do_not_matter(format):
    rng = random.Random(0)
    words = [BEGIN, END, CALL, DONE, SEP, K_BEGIN, K_END, K_CALL, K_ARGS, K_DONE, "function", "f"]
    words += ["<tool_call>", "</tool_call>", "<function=now>", "<parameter=path>", "</parameter>"]
    words += ["</function>", '{"name": "f", "arguments": ', "{", "}", '"', "\\", "```json", "\n"]
    words += [f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", f'<{DSML}invoke name="write">']
    words += [f"</{DSML}invoke>", f'<{DSML}parameter name="any" {TEXT}>', f"</{DSML}parameter>"]
    words += [f'<{DSML}parameter name="mode">', f"<{DSML}invoke", f"<{DSML}parameter", DSML]
    words += ["<", " ", "a", "functions.f:0", "[", "]", ": ", "<function=", ">"]
    for _ in range(150):
        text = "".join(rng.choices(words, k=rng.randint(1, 14)))
        whole = collect(format, [text])
        assert collect(format, list(text)) == whole, text
        at = rng.randint(0, len(text))
        assert collect(format, [text[:at], text[at:]]) == whole, text


@pytest.mark.parametrize(
    "format,head",
    [
        ("deepseek_v31", CALL),
        ("deepseek_v3", f"{CALL}function{SEP}"),
        ("kimi_k2", K_CALL),
        ("qwen3_coder", "<tool_call><function="),
        ("deepseek_v4", f'<{DSML}tool_calls><{DSML}invoke name="'),
    ],
)
@pytest.mark.parametrize("length", [MAX_HEAD_CHARS - 30, MAX_HEAD_CHARS + 30, 5000])
def test_an_endless_head_is_given_out(format, head, length):
    text = head + "x" * length
    for ends in ("", " end"):
        whole = collect(format, [text + ends])
        assert whole == collect(format, list(text + ends)) == (text + ends, [])
    if length == 5000:
        parser = make_tool_parser(format)
        assert parser.feed(text).content == text, "it must not wait for ever"


def test_arguments_are_given_as_they_are_written():
    parser = make_tool_parser("qwen3_coder", TOOLS)
    parser.feed("<tool_call><function=write><parameter=path>\nfirst ")
    (delta,) = parser.feed("line\nsecond").calls
    assert delta.arguments == "line\\nsecond"
    parser = make_tool_parser("kimi_k2")
    parser.feed(f'{K_BEGIN}{K_CALL}functions.f:0{K_ARGS}{{"a')
    assert parser.feed('b": ').calls[0].arguments == 'b": '


def test_ids_are_new_each_time():
    assert len({new_call_id() for _ in range(100)}) == 100
    assert new_call_id().startswith("call_")


def test_arguments_of_good_calls_are_the_models_json():
    for format, text in (("hermes", hermes("f", ARGS)), ("kimi_k2", k2("f:0", ARGS))):
        assert json.loads(collect(format, [text])[1][0][2]) == json.loads(ARGS)


@pytest.mark.parametrize(
    "template,want",
    [
        (None, None),
        ("{{ messages }}", None),
        ("<｜tool▁call▁begin｜>' + t + '<｜tool▁sep｜>\n```json", "deepseek_v3"),
        ("<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>", "deepseek_v31"),
        (f"...<{DSML}tool_calls>", "deepseek_v4"),
        (f"...<{DSML}function_calls>", "deepseek_v32"),
        ("<|tool_call_begin|>", "kimi_k2"),
        ("<tool_call>\n<function=", "qwen3_coder"),
        ("<tool_call>\n{", "hermes"),
    ],
)
def test_the_template_chooses_the_format(template, want):
    assert choose_tool_format(template) == want


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match="got 'x', wanted one of deepseek_v3"):
        make_tool_parser("x")
