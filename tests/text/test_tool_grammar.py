"""Whatever a forced tool call's grammar allows, the parser of the same format reads as calls with
valid arguments. Texts are made by random walks through the masks.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import jaxmoe
from jaxmoe.common.errors import ConfigError, RequestError
from jaxmoe.sampling.grammar import GrammarCompiler
from jaxmoe.structured_output import StructuredOutput
from jaxmoe.text.tokenizer import Tokenizer
from jaxmoe.text.tool_calls import TOOL_FORMATS, make_tool_parser
from jaxmoe.text.tool_grammar import chosen_tools, free_grammar, tool_grammar

EOS = 1
DEMO = Tokenizer.from_dir(Path(jaxmoe.__file__).parent / "demo")
DS = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
DS_BEGIN, DS_END, DS_CALL, DS_DONE, DS_SEP = (f"<｜tool▁{name}｜>" for name in DS)
K_BEGIN, K_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
K_CALL, K_ARGS, K_DONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MARKS = [DS_BEGIN, DS_END, DS_CALL, DS_DONE, DS_SEP, K_BEGIN, K_END, K_CALL, K_ARGS, K_DONE]
DSML = "｜DSML｜"
MARKS += ["<tool_call>", "</tool_call>", DSML]
FIRST = DEMO.vocab_size
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 6},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "hours": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "now"}}


def token_bytes(token):
    return MARKS[token - FIRST].encode() if token >= FIRST else DEMO.token_bytes(token)


COMPILER = GrammarCompiler(
    token_bytes,
    FIRST + len(MARKS),
    DEMO.tag_ids() | set(range(FIRST, FIRST + len(MARKS))),
    (EOS,),
    lambda text: DEMO.encode(text, add_special_tokens=False),
    FIRST + len(MARKS),
)


def token_id(text):
    return FIRST + MARKS.index(text) if text in MARKS else None


LETTERS = set(b'abXY19 ,.:"{}[]<>/\n')
CLOSING = DEMO.encode("\n</parameter>\n", add_special_tokens=False)


def closing(format, marks_are_tokens=True):
    """What ends a free text inside a call: nobody finds it by chance."""
    if format not in DSML_FORMATS:
        return CLOSING
    if marks_are_tokens:
        return [*DEMO.encode("</", add_special_tokens=False), token_id(DSML)]
    return DEMO.encode(f"</{DSML}parameter>\n", add_special_tokens=False)


def write(spec, rng, first=(), closing=CLOSING):
    """A text that the grammar allows; of free text only some plain tokens, and it ends soon.
    first: tokens that it begins with.
    """
    grammar = COMPILER.matcher(spec)
    out, tokens, planned = b"", [], []
    for token in first:
        assert token in allowed(grammar.mask()), (out, token)
        grammar.accept(token)
        out += token_bytes(token)
        tokens.append(token)
    while not grammar.complete:
        bits = allowed(grammar.mask())
        if EOS in bits and rng.random() < 0.6:
            break
        bits.discard(EOS)
        plain = [t for t in bits if len(bits) < 40 or set(token_bytes(t)) <= LETTERS]
        ends = [t for t in plain if token_bytes(t)[:1] in b'"<\n}' or t >= FIRST]
        token = rng.choice(sorted(ends if ends and rng.random() < 0.5 else plain or bits))
        if not planned and closing[0] in bits and len(bits) > 1000 and rng.random() < 0.3:
            planned = list(closing)
        if planned:
            token = planned.pop(0)
        grammar.accept(token)
        assert grammar.error is None
        out += token_bytes(token)
        tokens.append(token)
        assert len(out) < 20_000
    return out.decode(), tokens


def allowed(mask):
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def read(format, text):
    parser = make_tool_parser(format, TOOLS)
    calls, content = {}, ""
    for delta in (*(parser.feed(c) for c in text), parser.finish()):
        content += delta.content
        for c in delta.calls:
            name, arguments = calls.get(c.index, ("", ""))
            calls[c.index] = (name + (c.name or ""), arguments + c.arguments)
    return content, list(calls.values())


def check(name, arguments, format):
    value = json.loads(arguments)
    if name == "now":
        assert value == {}
        return
    assert name == "weather" and {"city", "days"} <= set(value) <= {"city", "unit", "days", "hours"}
    assert isinstance(value["city"], str) and (format in RAW_STRINGS or len(value["city"]) <= 6)
    assert value.get("unit", "C") in ("C", "F") and 1 <= value["days"] <= 9
    assert all(isinstance(h, int) for h in value.get("hours", []))


# DeepSeek-V3.2's grammar is V4's with another name of the block.
WALKED = [
    pytest.param(f, marks=[pytest.mark.slow] if f == "deepseek_v32" else []) for f in TOOL_FORMATS
]


@pytest.mark.parametrize("marks_are_tokens", [True, False])
@pytest.mark.parametrize("format", WALKED)
def test_what_the_grammar_allows_is_calls_with_valid_arguments(format, marks_are_tokens):
    rng = random.Random(0)
    find = token_id if marks_are_tokens else lambda text: None
    spec = tool_grammar(format, TOOLS, "required", find)
    names, counts = set(), set()
    for _ in range(25):
        text, tokens = write(spec, rng, closing=closing(format, marks_are_tokens))
        content, calls = read(format, text)
        assert content == "" and calls, text
        for name, arguments in calls:
            check(name, arguments, format)
            names.add(name)
        counts.add(len(calls))
        assert any(t >= FIRST for t in tokens) is marks_are_tokens
    assert names == {"weather", "now"} and len(counts) > 1


@pytest.mark.parametrize("format", WALKED)
def test_a_named_function_is_called_once(format):
    spec = tool_grammar(format, TOOLS, NAMED, token_id)
    rng = random.Random(1)
    for _ in range(5):
        assert [name for name, _ in read(format, write(spec, rng)[0])[1]] == ["now"]
    one = tool_grammar(format, TOOLS, "required", token_id, parallel=False)
    written = [write(one, rng, closing=closing(format))[0] for _ in range(10)]
    assert all(len(read(format, text)[1]) == 1 for text in written)


STRICT = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
BEGINS = {
    "deepseek_v3": DS_BEGIN,
    "deepseek_v31": DS_BEGIN,
    "hermes": "<tool_call>",
    "kimi_k2": K_BEGIN,
    "qwen3_coder": "<tool_call>",
    "deepseek_v32": DSML,
    "deepseek_v4": DSML,
}
DSML_FORMATS = {"deepseek_v32": "function_calls", "deepseek_v4": "tool_calls"}
RAW_STRINGS = {"qwen3_coder", *DSML_FORMATS}  # of strings, only their choices are kept


@pytest.mark.parametrize("marks_are_tokens", [True, False])
@pytest.mark.parametrize("format", WALKED)
def test_calls_the_model_makes_by_itself_are_held_to_strict_schemas(format, marks_are_tokens):
    find = token_id if marks_are_tokens else lambda text: None
    assert free_grammar(format, TOOLS, find) is None  # nothing is asked for
    spec = free_grammar(format, STRICT, find, parallel=False)
    rng = random.Random(2)
    plain = DEMO.encode("Let me see.\n", add_special_tokens=False)
    lead = "<" if format in DSML_FORMATS else ""
    begin = DEMO.encode(lead, add_special_tokens=False) if lead else []
    if marks_are_tokens:
        begin.append(find(BEGINS[format]))
    else:
        whole = BEGINS[format] + (DSML_FORMATS[format] + ">" if lead else "")
        begin = DEMO.encode(lead + whole, add_special_tokens=False)
    names = set()
    for _ in range(10):
        text, _ = write(spec, rng, [*plain, *begin], closing(format, marks_are_tokens))
        content, calls = read(format, text)
        assert content.strip() == "Let me see." and len(calls) == 1, text
        (name, arguments) = calls[0]
        names.add(name)
        if name == "weather":
            check(name, arguments, format)
        else:
            assert isinstance(json.loads(arguments), dict)
    assert "weather" in names
    # Text alone may end at any moment, and the mark cannot be written another way.
    grammar = COMPILER.matcher(spec)
    for token in plain:
        assert EOS in allowed(grammar.mask())
        grammar.accept(token)
    if marks_are_tokens:
        *most, last = DEMO.encode(BEGINS[format], add_special_tokens=False)
        for token in most:
            grammar.accept(token)
        assert last not in allowed(grammar.mask())


def test_several_calls_where_several_are_allowed():
    spec = free_grammar("hermes", STRICT, token_id)
    begin = [token_id("<tool_call>")]
    counts = {len(read("hermes", write(spec, random.Random(i), begin)[0])[1]) for i in range(12)}
    assert min(counts) == 1 < max(counts)


WANTED = {
    "deepseek_v3": f"{DS_BEGIN}{DS_CALL}function{DS_SEP}now\n```json\n{{}}\n```{DS_DONE}{DS_END}",
    "deepseek_v31": f"{DS_BEGIN}{DS_CALL}now{DS_SEP}{{}}{DS_DONE}{DS_END}",
    "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "kimi_k2": f"{K_BEGIN}{K_CALL}functions.now:0{K_ARGS}{{}}{K_DONE}{K_END}",
    "qwen3_coder": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    **{
        name: f'\n\n<{DSML}{block}>\n<{DSML}invoke name="now">\n</{DSML}invoke>\n</{DSML}{block}>'
        for name, block in DSML_FORMATS.items()
    },
}


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_the_exact_text_of_the_formats(format):
    """As the model cards show it."""
    grammar = COMPILER.matcher(tool_grammar(format, TOOLS, NAMED, lambda text: None))
    for token in DEMO.encode(WANTED[format], add_special_tokens=False):
        assert token in allowed(grammar.mask())
        grammar.accept(token)
    assert grammar.complete and grammar.error is None


@pytest.mark.parametrize(
    "choice,names",
    [
        (None, None),
        ("auto", None),
        ("none", None),
        ("required", ["weather", "now"]),
        (NAMED, ["now"]),
        ({"type": "function", "name": "now"}, ["now"]),
    ],
)
def test_which_tools_must_be_called(choice, names):
    chosen = chosen_tools(TOOLS, choice)
    assert names == (None if chosen is None else [t["function"]["name"] for t in chosen])
    assert (tool_grammar("hermes", TOOLS, choice, token_id) is None) is (names is None)


@pytest.mark.parametrize(
    "tools,choice,words",
    [
        (TOOLS, "always", "tool_choice: got 'always'"),
        (
            TOOLS,
            {"type": "function", "function": {"name": "x"}},
            "wanted one of the tools: weather",
        ),
        (TOOLS, {"type": "custom", "name": "now"}, "tool_choice: got"),
        ([], "required", "needs tools"),
        ("x", "required", "wanted a list of tools"),
        ([{"type": "function"}], "required", r"tools\[0\]: got"),
        ([{"type": "web_search", "function": {"name": "x"}}], "required", r"tools\[0\]: got"),
        ([{"function": {"name": "a b"}}], "required", r"function.name: got 'a b'"),
        ([{"function": {"name": 'a"'}}], "required", r"function.name"),
        ([{"function": {"name": "a"}}, {"function": {"name": "a"}}], "required", "twice"),
        ([{"function": {"name": "a", "parameters": []}}], "required", "wanted a JSON schema"),
        ([{"function": {"name": "a", "description": 1}}], "required", "wanted text"),
    ],
)
def test_bad_tools_and_choices(tools, choice, words):
    with pytest.raises(RequestError, match=words):
        tool_grammar("hermes", tools, choice, token_id)


def test_a_bad_schema_is_refused_when_compiled():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "wrong"}}}]
    with pytest.raises(RequestError, match="[Ii]nvalid type"):
        COMPILER.prepare(tool_grammar("hermes", tools, "required", token_id))
    with pytest.raises(ConfigError, match="tool format"):
        tool_grammar("x", TOOLS, "required", token_id)


def test_a_schema_with_definitions_and_awkward_names():
    schema = {
        "properties": {
            'a"b\\é': {"$ref": "#/$defs/one"},
            "c": {"type": ["integer", "null"]},
        },
        "required": ['a"b\\é', "c"],
        "$defs": {"one": {"const": "x\n"}},
    }
    tools = [{"type": "function", "function": {"name": "f-1.2", "parameters": schema}}]
    for format in TOOL_FORMATS:
        spec = tool_grammar(format, tools, "required", token_id, parallel=False)
        assert isinstance(spec, StructuredOutput)
        text, _ = write(spec, random.Random(3))
        parser = make_tool_parser(format, tools)
        first, last = parser.feed(text), parser.finish()
        arguments = "".join(c.arguments for d in (first, last) for c in d.calls)
        value = json.loads(arguments)
        assert value['a"b\\é'] == "x\n" and (value["c"] is None or isinstance(value["c"], int))
        assert first.calls[0].name == "f-1.2" and first.content + last.content == ""
