"""The forms of request fields that are lists or objects, each with its JSON schema.

A check returns what handlers see: messages and tools of every API in the one form chat templates
take (OpenAI's chat form), choices and formats as small values. What it does not do: the fields'
names and endpoints (fields.py), Anthropic's and the Responses API's inputs (their own modules).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import orjson

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import Rule, check_value, shown
from jaxmoe.sampling_params import MAX_STOP_CHARS, MAX_STOPS, MAX_TOKEN_ID
from jaxmoe.serving import anthropic_input, responses_input
from jaxmoe.serving.chat_forms import (
    FUNCTION_SCHEMA,
    MESSAGE_SCHEMA,
    check_function,
    check_message,
)
from jaxmoe.text.chat_template import RESERVED

MAX_GRAMMAR_CHARS = 1 << 20
MAX_CHOICES = 4096
MAX_PROMPT_CHARS = 32 << 20  # more than any context holds; bodies have a bound of their own
MAX_PROMPT_TOKENS = 1 << 24
MAX_SWITCH_CHARS = 1 << 16
MAX_FORMAT_NAME_CHARS = 64
MAX_BUDGET_TOKENS = 2**31 - 1
MAX_INCLUDES = 64
# OpenAI's levels, and Anthropic's "max".
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_OBJECT = {"type": "object", "additionalProperties": True}


@dataclasses.dataclass(frozen=True)
class Form:
    check: Callable[[str, Any], Any]
    schema: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """mode "named" forces the function `name`; "required" any of them. parallel: more than one
    call in one answer; None: not said here.
    """

    mode: Literal["auto", "none", "required", "named"]
    name: str | None = None
    parallel: bool | None = None


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """What the whole answer must be. value: a schema (json_schema), a text (regex, grammar), a
    list of texts (choice), or None (json_object). param: where in the body it stands, for errors
    of what compiles it. name: the client's for a schema.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: Any = None
    param: str = "response_format"
    name: str = "schema"


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Anthropic's output_config. effort: as reasoning_effort."""

    format: OutputFormat | None = None
    effort: str | None = None


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{name}: got {shown(value)}, wanted an object")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{name}: got {shown(value)}, wanted a list")
    return value


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}: got {shown(value)}, wanted true or false")
    return value


def _text(name: str, value: Any, high: int | None = None) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name}: got {shown(value)}, wanted text")
    if high is not None and len(value) > high:
        raise RequestError(f"{name}: got {len(value)} characters, wanted at most {high}")
    return value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _list(name, value)
    if len(ids) > MAX_PROMPT_TOKENS:
        raise RequestError(f"{name}: got {len(ids)} ids, wanted at most {MAX_PROMPT_TOKENS}")
    for at, i in enumerate(ids):
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MAX_TOKEN_ID:
            raise RequestError(f"{name}[{at}]: got {shown(i)}, wanted a token id")
    return tuple(ids)


def _prompt(name: str, value: Any) -> list[str | tuple[int, ...]]:
    """A list of prompts, each a text or token ids."""
    if isinstance(value, str):
        return [_some_text(name, value)]
    items = _list(name, value)
    if not items:
        raise RequestError(f"{name}: got an empty list, wanted at least one prompt")
    if all(isinstance(p, int) for p in items):
        return [_token_ids(name, items)]
    out: list[str | tuple[int, ...]] = []
    for at, item in enumerate(items):
        if isinstance(item, list) and item:
            out.append(_token_ids(f"{name}[{at}]", item))
        else:
            out.append(_some_text(f"{name}[{at}]", item))
    return out


def _some_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name}: got {shown(value)}, wanted text or token ids, not empty")
    return _text(name, value, MAX_PROMPT_CHARS)


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else _list(name, value)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{name}: got {len(stops)} strings, wanted at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise RequestError(
                f"{name}: got {shown(stop)}, wanted strings of 1 to {MAX_STOP_CHARS} characters"
            )
    return tuple(stops)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    out = {}
    for key, bias in _object(name, value).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
            raise RequestError(f"{name}: got the key {shown(key)}, wanted a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= 100:
            raise RequestError(f"{name}[{key}]: got {shown(bias)}, wanted a number -100 to 100")
        if int(key) in out:
            raise RequestError(f"{name}: got {shown(key)}, a token that another key names too")
        out[int(key)] = float(bias)
    return out


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    options = _object(name, value)
    known = ("include_usage", "continuous_usage_stats")
    return {k: _bool(f"{name}.{k}", v) for k, v in options.items() if k in known and v is not None}


def _template_kwargs(name: str, value: Any) -> dict[str, Any]:
    for key, v in _object(name, value).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", key) or key.startswith("__"):
            raise RequestError(f"{name}: got the name {shown(key)}, wanted an identifier")
        if key in RESERVED:
            raise RequestError(
                f"{name}.{key}: is set by the server, wanted a name that is not "
                + ", ".join(sorted(RESERVED))
            )
        if not isinstance(v, (bool, int, float, str, type(None))):
            raise RequestError(f"{name}.{key}: got {shown(v)}, wanted a plain value")
        if isinstance(v, str):
            _text(f"{name}.{key}", v, MAX_SWITCH_CHARS)
    return value


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    return [check_message(f"{name}[{at}]", m) for at, m in enumerate(_list(name, value))]


def _chat_tools(name: str, value: Any) -> list[dict[str, Any]]:
    out = []
    for at, tool in enumerate(_list(name, value)):
        where = f"{name}[{at}]"
        if _object(where, tool).get("type", "function") != "function":
            raise RequestError(f"{where}.type: got {shown(tool['type'])}, wanted 'function'")
        out.append(check_function(f"{where}.function", tool.get("function")))
    return _unique(name, out)


def _responses_tools(name: str, value: Any) -> list[dict[str, Any]]:
    out = []
    for at, tool in enumerate(_list(name, value)):
        where = f"{name}[{at}]"
        if _object(where, tool).get("type") != "function":
            raise RequestError(
                f"{where}.type: got {shown(tool.get('type'))}, wanted 'function' (this server has "
                "no tools of its own)"
            )
        out.append(check_function(where, {k: v for k, v in tool.items() if k != "type"}))
    return _unique(name, out)


def _anthropic_tools(name: str, value: Any) -> list[dict[str, Any]]:
    out = []
    for at, tool in enumerate(_list(name, value)):
        where = f"{name}[{at}]"
        if _object(where, tool).get("type", "custom") not in ("custom", None):
            raise RequestError(
                f"{where}.type: got {shown(tool['type'])}, wanted 'custom' (this server has no "
                "tools of its own)"
            )
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
        }
        out.append(check_function(where, function))
    return _unique(name, out)


def _unique(name: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = [t["function"]["name"] for t in tools]
    for n in names:
        if names.count(n) > 1:
            raise RequestError(f"{name}: the name {n!r} is there twice")
    return tools


def _chat_tool_choice(name: str, value: Any) -> ToolChoice:
    if value in ("auto", "none", "required"):
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return ToolChoice("named", function["name"])
    raise RequestError(
        f"{name}: got {shown(value)}, wanted 'auto', 'none', 'required' or "
        "{'type': 'function', 'function': {'name': ...}}"
    )


def _responses_tool_choice(name: str, value: Any) -> ToolChoice:
    if value in ("auto", "none", "required"):
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "function":
        if isinstance(value.get("name"), str):
            return ToolChoice("named", value["name"])
    raise RequestError(
        f"{name}: got {shown(value)}, wanted 'auto', 'none', 'required' or "
        "{'type': 'function', 'name': ...}"
    )


def _anthropic_tool_choice(name: str, value: Any) -> ToolChoice:
    kind = _object(name, value).get("type")
    one = value.get("disable_parallel_tool_use")
    parallel = None if one is None else not _bool(f"{name}.disable_parallel_tool_use", one)
    if kind in ("auto", "none"):
        return ToolChoice(kind, None, parallel)
    if kind == "any":
        return ToolChoice("required", None, parallel)
    if kind == "tool" and isinstance(value.get("name"), str):
        return ToolChoice("named", value["name"], parallel)
    raise RequestError(
        f"{name}: got {shown(value)}, wanted the type auto, any, none, or tool with a name"
    )


def _json_schema(name: str, value: Any, schema_name: str = "schema") -> OutputFormat:
    if isinstance(value, str):
        try:
            value = orjson.loads(_text(name, value, MAX_GRAMMAR_CHARS))
        except orjson.JSONDecodeError as e:
            raise RequestError(f"{name}: not valid JSON: {e}") from None
    if not isinstance(value, (dict, bool)):
        raise RequestError(f"{name}: got {shown(value)}, wanted a JSON schema")
    return OutputFormat("json_schema", value, name, schema_name)


def _response_format(name: str, value: Any) -> OutputFormat | None:
    kind = _object(name, value).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return OutputFormat("json_object", param=name)
    if kind == "json_schema":
        inner = _object(f"{name}.json_schema", value.get("json_schema"))
        return _json_schema(f"{name}.json_schema.schema", inner.get("schema", {}))
    raise RequestError(
        f"{name}.type: got {shown(kind)}, wanted 'text', 'json_object' or 'json_schema'"
    )


def _flat_format(name: str, value: Any) -> OutputFormat | None:
    """The Responses API's and Anthropic's form: the schema beside the type."""
    kind = _object(name, value).get("type")
    if kind == "json_schema":
        schema_name = value.get("name")
        if schema_name is not None:
            _text(f"{name}.name", schema_name, MAX_FORMAT_NAME_CHARS)
        return _json_schema(f"{name}.schema", value.get("schema"), schema_name or "schema")
    return _response_format(name, value)


def _text_format(name: str, value: Any) -> OutputFormat | None:
    inner = _object(name, value).get("format")
    return None if inner is None else _flat_format(f"{name}.format", inner)


def _output_config(name: str, value: Any) -> OutputConfig:
    effort = _object(name, value).get("effort")
    return OutputConfig(
        _text_format(name, value), None if effort is None else _effort(f"{name}.effort", effort)
    )


def _effort(name: str, value: Any) -> str:
    if value not in EFFORTS:
        raise RequestError(f"{name}: got {shown(value)}, wanted one of {', '.join(EFFORTS)}")
    return value


def _structured_outputs(name: str, value: Any) -> OutputFormat | None:
    given = {k: v for k, v in _object(name, value).items() if v is not None and v is not False}
    known = ("json", "regex", "choice", "grammar", "json_object")
    for key in given:
        if key not in known:
            raise RequestError(f"{name}.{key}: unknown; wanted one of {', '.join(known)}")
    if len(given) != 1:
        raise RequestError(f"{name}: got {len(given)} of {', '.join(known)}, wanted one of them")
    (kind, v), where = next(iter(given.items())), f"{name}.{next(iter(given))}"
    if kind == "json":
        return _json_schema(where, v)
    if kind == "json_object":
        _bool(where, v)
        return OutputFormat("json_object", param=where)
    if kind == "choice":
        choices = _list(where, v)
        if not 0 < len(choices) <= MAX_CHOICES:
            raise RequestError(f"{where}: got {len(choices)} texts, wanted 1 to {MAX_CHOICES}")
        return OutputFormat("choice", tuple(_some_text(where, c) for c in choices), where)
    text = _text(where, v, MAX_GRAMMAR_CHARS)
    return OutputFormat("regex" if kind == "regex" else "grammar", text, where)


def _thinking(name: str, value: Any) -> bool | None:
    """Whether thinking is asked for; None where that is left to the model."""
    kind = _object(name, value).get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise RequestError(f"{name}.type: got {shown(kind)}, wanted enabled, disabled or adaptive")
    budget = value.get("budget_tokens")
    if budget is not None:
        check_value(f"{name}.budget_tokens", budget, _BUDGET, RequestError)
    return {"enabled": True, "disabled": False}.get(kind)


def _responses_reasoning(name: str, value: Any) -> str | None:
    effort = _object(name, value).get("effort")
    return None if effort is None else _effort(f"{name}.effort", effort)


def _includes(name: str, value: Any) -> list[str]:
    return [_text(f"{name}[{at}]", v, 128) for at, v in enumerate(_list(name, value))]


_BUDGET = Rule("int", "tokens of thoughts", low=1, high=MAX_BUDGET_TOKENS)
_EFFORT_SCHEMA = {"enum": [*EFFORTS, None]}
_TEXT_SCHEMA = {"type": "string", "maxLength": MAX_PROMPT_CHARS}
_ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_IDS_SCHEMA = {"type": "array", "items": _ID_SCHEMA, "maxItems": MAX_PROMPT_TOKENS}
_SOME_TEXT_SCHEMA = {**_TEXT_SCHEMA, "minLength": 1}
_ITEMS_OR_TEXT = {"anyOf": [_TEXT_SCHEMA, {"type": "array"}]}
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_FORMAT_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
    "required": ["type"],
}

OBJECT = Form(_object, _OBJECT)
BOOL = Form(_bool, {"type": "boolean"})
TOKEN_IDS = Form(_token_ids, _IDS_SCHEMA)
PROMPT = Form(
    _prompt,
    {
        "anyOf": [
            _SOME_TEXT_SCHEMA,
            {"type": "array", "minItems": 1, "items": _SOME_TEXT_SCHEMA},
            {**_IDS_SCHEMA, "minItems": 1},
            {"type": "array", "minItems": 1, "items": {**_IDS_SCHEMA, "minItems": 1}},
        ]
    },
)
STOP = Form(
    _stop, {"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MAX_STOPS}]}
)
LOGIT_BIAS = Form(
    _logit_bias,
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
)
STREAM_OPTIONS = Form(
    _stream_options,
    {
        "type": "object",
        "properties": {
            "include_usage": {"type": "boolean"},
            "continuous_usage_stats": {"type": "boolean"},
        },
    },
)
TEMPLATE_KWARGS = Form(
    _template_kwargs,
    {
        "type": "object",
        "propertyNames": {
            "pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$",
            "not": {"enum": sorted(RESERVED)},
        },
        "additionalProperties": {
            "anyOf": [
                {"type": ["boolean", "number", "null"]},
                {"type": "string", "maxLength": MAX_SWITCH_CHARS},
            ]
        },
    },
)
CHAT_MESSAGES = Form(_messages, {"type": "array", "minItems": 1, "items": MESSAGE_SCHEMA})
CHAT_TOOLS = Form(
    _chat_tools,
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": FUNCTION_SCHEMA},
            "required": ["type", "function"],
        },
    },
)
RESPONSES_TOOLS = Form(_responses_tools, {"type": "array", "items": _OBJECT})
ANTHROPIC_TOOLS = Form(_anthropic_tools, {"type": "array", "items": _OBJECT})
_CHOICE_SCHEMA = {"anyOf": [{"enum": ["auto", "none", "required"]}, _OBJECT]}
CHAT_TOOL_CHOICE = Form(_chat_tool_choice, _CHOICE_SCHEMA)
RESPONSES_TOOL_CHOICE = Form(_responses_tool_choice, _CHOICE_SCHEMA)
ANTHROPIC_TOOL_CHOICE = Form(_anthropic_tool_choice, _OBJECT)
RESPONSE_FORMAT = Form(_response_format, _FORMAT_SCHEMA)
TEXT_FORMAT = Form(_text_format, _OBJECT)
OUTPUT_CONFIG = Form(_output_config, {**_OBJECT, "properties": {"effort": _EFFORT_SCHEMA}})
STRUCTURED_OUTPUTS = Form(_structured_outputs, _OBJECT)
THINKING = Form(
    _thinking,
    {
        "type": "object",
        "properties": {
            "type": {"enum": ["enabled", "disabled", "adaptive"]},
            "budget_tokens": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": MAX_BUDGET_TOKENS,
            },
        },
        "required": ["type"],
    },
)
RESPONSES_REASONING = Form(
    _responses_reasoning, {**_OBJECT, "properties": {"effort": _EFFORT_SCHEMA}}
)
INCLUDES = Form(_includes, {"type": "array", "items": {"type": "string", "maxLength": 128}})
RESPONSES_INPUT = Form(
    responses_input.check_input, {"anyOf": [_SOME_TEXT_SCHEMA, {"type": "array"}]}
)
ANTHROPIC_MESSAGES = Form(
    anthropic_input.check_messages,
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": {
                "role": {"enum": ["user", "assistant"]},
                "content": {"anyOf": [{"type": "string"}, {"type": "array"}]},
            },
            "required": ["role", "content"],
        },
    },
)
ANTHROPIC_SYSTEM = Form(anthropic_input.check_system, _ITEMS_OR_TEXT)
