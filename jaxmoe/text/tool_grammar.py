"""Grammars that make a model call tools (tool_choice "required" or a named function), or hold the
calls it makes by itself to what the request allows (strict functions, one call at most).

Forced, the text is exactly one or more calls in the model's own format, each with the name of an
offered function and arguments valid under its JSON schema, and nothing else. Left to the model, it
is any text, followed by such calls or not. Marks that are single tokens of the tokenizer are forced
as these tokens; where the tokenizer has none, as text.

`tool_grammar` and `free_grammar` are for one request; the parsers of tool_calls.py read the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.common.errors import ConfigError, RequestError
from jaxmoe.common.fields import shown
from jaxmoe.structured_output import JSON_OPTIONS, StructuredOutput, lark_literal
from jaxmoe.text import dsml
from jaxmoe.text.tool_calls import TOOL_FORMATS
from jaxmoe.text.tool_calls_marked import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, Marks
from jaxmoe.text.tool_calls_xml import PARAMETER_END, parameter_types
from jaxmoe.text.tools import check_tools

MAX_CALLS = 32  # in one text; a model that never stops calling must end somewhere
ToolChoice = str | Mapping[str, Any] | None


def chosen_tools(
    tools: Sequence[Mapping[str, Any]], tool_choice: ToolChoice
) -> list[Mapping[str, Any]] | None:
    """The tools that must be called, one of them at least: all ("required"), the named one, or
    None where the model is free ("auto", "none", None).

    tool_choice: OpenAI's, also in the forms {"type": "function", "function": {"name": ...}} and
    {"type": "function", "name": ...}. RequestError where it names no offered tool.
    """
    if tool_choice in (None, "auto", "none"):
        return None
    tools = check_tools(tools)
    if not tools:
        raise RequestError("tool_choice: needs tools")
    if tool_choice == "required":
        return list(tools)
    name = None
    if isinstance(tool_choice, Mapping) and tool_choice.get("type", "function") == "function":
        function = tool_choice.get("function", tool_choice)
        name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            f"tool_choice: got {shown(tool_choice)}, wanted 'auto', 'none', 'required' or a "
            "function by name"
        )
    found = [t for t in tools if t["function"]["name"] == name]
    if not found:
        known = ", ".join(t["function"]["name"] for t in tools)
        raise RequestError(f"tool_choice: got {name!r}, wanted one of the tools: {known}")
    return list(found)


def tool_grammar(
    format: str,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: ToolChoice,
    token_id: Callable[[str], int | None],
    *,
    parallel: bool = True,
) -> StructuredOutput | None:
    """The grammar of a request's text; None where the model is free.

    Args:
        format: one of tool_calls.TOOL_FORMATS.
        token_id: the id of a text that is one token, else None (`Tokenizer.token_id`).
        parallel: whether several calls are allowed (parallel_tool_calls); a named function is
            called once.

    Raises RequestError for a bad tool_choice or tool, ConfigError for an unknown format.
    """
    chosen = chosen_tools(tools, tool_choice)
    if chosen is None:
        return None
    functions = [t["function"] for t in chosen]
    many = parallel and tool_choice == "required"
    lark = _Lark(token_id)
    lead, begin, rest = _calls(lark, format, functions, many)
    lark.rule("start", f"{lark_literal(lead) if lead else ''} {lark.mark(begin)} {rest}")
    return StructuredOutput.grammar(lark.text())


def free_grammar(
    format: str,
    tools: Sequence[Mapping[str, Any]],
    token_id: Callable[[str], int | None],
    *,
    parallel: bool = True,
) -> StructuredOutput | None:
    """For tool_choice "auto": any text, then perhaps calls, which follow the schemas of functions
    that are `strict`, and of which there is one where `parallel` is false. None where a request
    asks for neither.

    Raises: as tool_grammar.
    """
    functions = [t["function"] for t in check_tools(tools)]
    if not functions or (parallel and not any(f.get("strict") for f in functions)):
        return None
    # Others may have any arguments. In tags there are only those that the schema names.
    if format != "qwen3_coder" and format not in dsml.BLOCKS:
        anything = {"type": "object"}
        functions = [f if f.get("strict") else {**f, "parameters": anything} for f in functions]
    lark = _Lark(token_id)
    lead, begin, rest = _calls(lark, format, functions, parallel)
    # A call begins with a mark, so text has none, however its tokens are cut.
    begins = [begin, *([_MARKED[format].call_begin] if format in _MARKED else [])]
    marks = "|".join("".join(f"\\{c}" if c in _REGEX_CHARS else c for c in m) for m in begins)
    text = lark.rule("TEXT", rf"/(.|\n)*/ & ~/(.|\n)*({marks})(.|\n)*/")
    if lead.endswith("<"):
        before = lark.rule("BEFORE", rf"/(.|\n)*</ & ~/(.|\n)*({marks})(.|\n)*/")
        lark.rule("start", f"{text}? | {before} {lark.mark(begin)} {rest}")
    elif token_id(begin) is not None:
        lark.rule("start", f"{text}? ({lark.mark(begin)} {rest})?")
    else:
        called = lark.rule(f"called[suffix={lark_literal(begin)}]", r"/(.|\n)*/")
        lark.rule("start", f"{text}? | {called} {rest}")
    return StructuredOutput.grammar(lark.text())


_MARKED = {"deepseek_v3": DEEPSEEK_V3, "deepseek_v31": DEEPSEEK_V31, "kimi_k2": KIMI_K2}
_REGEX_CHARS = set("\\/.^$*+?()[]{}|~&\"'")


def _calls(
    lark: _Lark, format: str, functions: Sequence[Mapping[str, Any]], many: bool
) -> tuple[str, str, str]:
    """What models write before calls, the mark that these begin with, and the rule of all that
    follows it.
    """
    if format in _MARKED:
        return "", *_marked(lark, _MARKED[format], functions, many)
    if format == "hermes":
        return "", *_hermes(lark, functions, many)
    if format == "qwen3_coder":
        return "", *_coder(lark, functions, many)
    if format in dsml.BLOCKS:
        return _dsml(lark, dsml.BLOCKS[format], functions, many)
    raise ConfigError(f"tool format: got {format!r}, wanted one of {', '.join(TOOL_FORMATS)}")


class _Lark:
    """A Lark grammar as it is written."""

    def __init__(self, token_id: Callable[[str], int | None]) -> None:
        self._token_id = token_id
        self._rules: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name.partition("[")[0]

    def mark(self, text: str) -> str:
        """A mark as its token, or as text."""
        token = self._token_id(text)
        return lark_literal(text) if token is None else f"<[{token}]>"

    def tagged(self, text: str) -> str:
        """A text with DSML's tags in it: their mark as its token, or all as text."""
        if self._token_id(dsml.DSML) is None:
            return lark_literal(text)
        plain = [lark_literal(part) if part else "" for part in text.split(dsml.DSML)]
        return f" {self.mark(dsml.DSML)} ".join(plain)

    def calls(self, names: Sequence[str], between: str = "", *, many: bool) -> str:
        """One or, with `many`, up to MAX_CALLS of some rules."""
        one = self.rule("call", " | ".join(names))
        if not many:
            return one
        return f"{one} ({between} {one}){{0,{MAX_CALLS - 1}}}"

    def text(self) -> str:
        return "\n".join(f"{name}: {body}" for name, body in self._rules.items())


def _marked(
    lark: _Lark, marks: Marks, functions: Sequence[Mapping[str, Any]], many: bool
) -> tuple[str, str]:
    names = []
    for i, function in enumerate(functions):
        arguments = lark.rule(f"arguments_{i}", _json(_parameters(function)))
        head, after = lark_literal(function["name"]), ""
        if marks.fenced:
            head = f"{lark_literal('function')} {lark.mark(marks.separator)} "
            head += lark_literal(f"{function['name']}\n```json\n")
            after = lark_literal("\n```")
        elif marks is KIMI_K2:
            head = f"{lark_literal('functions.' + function['name'] + ':')} /[0-9]{{1,4}}/"
            head += f" {lark.mark(marks.separator)}"
        else:
            head += f" {lark.mark(marks.separator)}"
        names.append(
            lark.rule(
                f"call_{i}",
                f"{lark.mark(marks.call_begin)} {head} {arguments} {after} "
                f"{lark.mark(marks.call_end)}",
            )
        )
    between = lark_literal("\n") if marks.fenced else ""
    calls = lark.calls(names, between, many=many)
    return marks.section_begin, f"{calls} {lark.mark(marks.section_end)}"


def _hermes(lark: _Lark, functions: Sequence[Mapping[str, Any]], many: bool) -> tuple[str, str]:
    begin, end = "<tool_call>", lark.mark("</tool_call>")
    names = []
    for i, function in enumerate(functions):
        arguments = lark.rule(f"arguments_{i}", _json(_parameters(function)))
        head = lark_literal('\n{"name": ' + json.dumps(function["name"]) + ', "arguments": ')
        tail = lark_literal("}\n")
        names.append(lark.rule(f"call_{i}", f"{head} {arguments} {tail} {end}"))
    between = f"{lark_literal(chr(10))} {lark.mark(begin)}"
    return begin, lark.calls(names, between, many=many)


def _properties(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Any]]:
    """A function's parameters, and the names of those that it must be given."""
    properties, required = schema.get("properties"), schema.get("required")
    return (
        properties if isinstance(properties, Mapping) else {},
        required if isinstance(required, (list, tuple)) else (),
    )


def _coder(lark: _Lark, functions: Sequence[Mapping[str, Any]], many: bool) -> tuple[str, str]:
    begin, end = "<tool_call>", lark.mark("</tool_call>")
    names = []
    for i, function in enumerate(functions):
        schema = _parameters(function)
        properties, required = _properties(schema)
        types = parameter_types(function)
        parts = []
        for j, (key, value) in enumerate(properties.items()):
            if types.get(key) == {"string"}:
                body = _string_value(lark, f"value_{i}_{j}", value)
            else:
                inner = lark.rule(f"value_{i}_{j}", _json(_with_definitions(value, schema)))
                body = f"{inner} {lark_literal(f'{chr(10)}{PARAMETER_END}{chr(10)}')}"
            part = lark.rule(
                f"parameter_{i}_{j}", f"{lark_literal(f'<parameter={key}>{chr(10)}')} {body}"
            )
            parts.append(part if key in required else f"{part}?")
        head = lark_literal(f"\n<function={function['name']}>\n")
        body = " ".join(parts)
        tail = lark_literal("</function>\n")
        names.append(lark.rule(f"call_{i}", f"{head} {body} {tail} {end}"))
    between = f"{lark_literal(chr(10))} {lark.mark(begin)}"
    return begin, lark.calls(names, between, many=many)


def _dsml(
    lark: _Lark, block: str, functions: Sequence[Mapping[str, Any]], many: bool
) -> tuple[str, str, str]:
    names = []
    for i, function in enumerate(functions):
        schema = _parameters(function)
        properties, required = _properties(schema)
        types = parameter_types(function)
        parts = []
        for j, (key, value) in enumerate(properties.items()):
            kinds = types.get(key, set())
            free = isinstance(value, Mapping) and not {"enum", "const"} & set(value)
            ways = []
            # A text of several types may be written as it is where nothing else is asked of it.
            if kinds == {"string"} or ("string" in kinds and free and "type" in value):
                head = lark.tagged(dsml.parameter_head(key, is_string=True))
                ways.append(f"{head} {_dsml_string(lark, f'text_{i}_{j}', value)}")
            if kinds != {"string"}:
                inner = lark.rule(f"value_{i}_{j}", _json(_with_definitions(value, schema)))
                head = lark.tagged(dsml.parameter_head(key, is_string=False))
                ways.append(f"{head} {inner} {lark.tagged(dsml.closing('parameter') + chr(10))}")
            part = lark.rule(f"parameter_{i}_{j}", " | ".join(ways))
            parts.append(part if key in required else f"{part}?")
        head = lark.tagged(dsml.invoke_head(function["name"]))
        tail = lark.tagged(dsml.closing("invoke") + "\n")
        names.append(lark.rule(f"call_{i}", f"{head} {' '.join(parts)} {tail}"))
    calls = f"{lark.calls(names, many=many)} {lark.tagged(dsml.closing(block))}"
    begin = dsml.opening(block)
    if lark.mark(dsml.DSML) == lark_literal(dsml.DSML):
        return "\n\n", begin, f"{lark_literal(chr(10))} {calls}"
    rest = begin.partition(dsml.DSML)[2] + "\n"
    return "\n\n<", dsml.DSML, f"{lark_literal(rest)} {calls}"


def _dsml_string(lark: _Lark, name: str, schema: Mapping[str, Any]) -> str:
    """Raw text up to the closing tag, and that; as _string_value."""
    closing = dsml.closing("parameter")
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, str) for v in values):
        return lark.rule(name, " | ".join(lark.tagged(f"{v}{closing}\n") for v in values))
    if lark.mark(dsml.DSML) == lark_literal(dsml.DSML):
        return lark.rule(f"{name}[suffix={lark_literal(closing)}]", r"/(.|\n)*/") + ' "\\n"'
    # Up to the "</" that the mark's token follows; no other text has that token.
    text = lark.rule(name.upper(), r"/(.|\n)*<\//")
    return f"{text} {lark.tagged(closing.removeprefix('</') + chr(10))}"


def _string_value(lark: _Lark, name: str, schema: Mapping[str, Any]) -> str:
    """Raw text up to the closing tag; of a string's restrictions, only enum and const are kept."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, str) for v in values):
        return lark.rule(name, " | ".join(lark_literal(f"{v}\n{PARAMETER_END}\n") for v in values))
    # Ends at the first closing tag, as the parser does; the newline before it is the model's.
    return lark.rule(f"{name}[suffix={lark_literal(PARAMETER_END)}]", r"/(.|\n)*/") + ' "\\n"'


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: always an object, and without one an empty one."""
    schema = function.get("parameters")
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema} if "type" not in schema else dict(schema)


def _with_definitions(value: Any, schema: Mapping[str, Any]) -> Any:
    """A property's schema with the definitions that its references point to."""
    if not isinstance(value, Mapping):
        return {}
    return {**{k: schema[k] for k in ("$defs", "definitions") if k in schema}, **value}


def _json(schema: Mapping[str, Any]) -> str:
    # Depth and size are checked where the whole grammar is (StructuredOutput).
    StructuredOutput.json_schema(schema)
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)
