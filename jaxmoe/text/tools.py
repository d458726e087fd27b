"""The tools a request offers, and the calls in its history, checked and in the form templates want.

OpenAI's clients send a call's arguments as JSON text. Most chat templates want them as an object
(Qwen3-Coder walks through its items), DeepSeek-V3's glues the text between strings. Which one a
template wants is found by trying it once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown

MAX_TOOLS = 512
MAX_TOOL_CALLS = 1024  # of one message
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

ArgumentsForm = Literal["object", "text"]

PROBE_KEY, PROBE_VALUE = "probe_key", "probe_value"
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "u"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "functions.probe:0",
                "type": "function",
                "function": {"name": "probe", "arguments": {PROBE_KEY: PROBE_VALUE}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "functions.probe:0", "content": "r"},
]


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Plain copies of OpenAI's tools list: {"type": "function", "function": {name, description,
    parameters}}. RequestError names the entry that is wrong.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError(f"tools: got {shown(tools)}, wanted a list of tools")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: got {len(tools)}, wanted at most {MAX_TOOLS}")
    out: list[dict[str, Any]] = []
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise RequestError(
                f"tools[{i}]: got {shown(tool)}, wanted an object of type 'function' with a "
                "'function'"
            )
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"tools[{i}].function.name: got {shown(name)}, wanted 1 to 128 letters, digits "
                "and _ . : -"
            )
        if name in names:
            raise RequestError(f"tools[{i}].function.name: {name!r} is there twice; rename one")
        names.add(name)
        for key, kind in (("description", str), ("parameters", Mapping)):
            value = function.get(key)
            if value is not None and not isinstance(value, kind):
                wanted = "text" if kind is str else "a JSON schema"
                raise RequestError(
                    f"tools[{i}].function.{key}: got {shown(value)}, wanted {wanted}"
                )
        out.append({**tool, "type": "function", "function": dict(function)})
    return out


def check_tool_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Plain copies of a message's tool_calls, their arguments as objects (as text where they are
    no JSON object: models do write such).
    """
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise RequestError(f"{name}: got {shown(calls)}, wanted a list of tool calls")
    if len(calls) > MAX_TOOL_CALLS:
        raise RequestError(f"{name}: got {len(calls)}, wanted at most {MAX_TOOL_CALLS}")
    out = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{name}[{i}]: got {shown(call)}, wanted a function with a name")
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        elif isinstance(arguments, str):
            arguments = _object(arguments)
        elif not isinstance(arguments, Mapping):
            raise RequestError(
                f"{name}[{i}].function.arguments: got {shown(arguments)}, wanted JSON text"
            )
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out


def in_form(messages: Sequence[Mapping[str, Any]], form: ArgumentsForm) -> list[dict[str, Any]]:
    """Checked messages with the arguments of their tool calls as objects or as JSON text."""
    if form == "object":
        return [dict(m) for m in messages]
    return [
        {**m, "tool_calls": [_with_text(c) for c in m["tool_calls"]]}
        if m.get("tool_calls")
        else dict(m)
        for m in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
