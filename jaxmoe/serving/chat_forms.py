"""Messages and functions in OpenAI's chat form, which every API's input becomes.

The form is what ChatTemplate.render takes: role, content as a text or text parts, tool_calls,
tool_call_id, reasoning_content. What it does not do: render anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown
from jaxmoe.text.tokenizer import check_text

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOOL_CALLS = 1024
MAX_NAME_CHARS = 128
_NAME = re.compile(rf"[a-zA-Z0-9_.:-]{{1,{MAX_NAME_CHARS}}}")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")

FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.:-]{1,128}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object", "additionalProperties": True},
    },
    "required": ["name"],
}
MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        },
    },
    "required": ["role", "content"],
}


def check_message(name: str, message: Any) -> dict[str, Any]:
    """One message in the form that templates take; unknown keys are dropped."""
    if not isinstance(message, dict):
        raise RequestError(f"{name}: got {shown(message)}, wanted an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{name}.role: got {shown(role)}, wanted one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = message.get("content")
    if content is None and role == "assistant":
        out["content"] = "" if calls else None
    elif isinstance(content, list) and role != "assistant":
        # The template's side joins them: DeepSeek-V4's puts blank lines between.
        texts = [part_text(f"{name}.content[{at}]", part) for at, part in enumerate(content)]
        out["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        out["content"] = content_text(f"{name}.content", content)
    if role == "user" and message.get("task") is not None:
        check_text(message["task"], f"{name}.task")
        out["task"] = message["task"]  # DeepSeek-V4's; other templates have no word for it
    if role == "assistant":
        for key in ("reasoning_content", "reasoning"):
            if message.get(key) is not None:
                check_text(message[key], f"{name}.{key}")
                out["reasoning_content"] = message[key]
        if calls:
            out["tool_calls"] = _check_calls(f"{name}.tool_calls", calls)
        elif out["content"] is None and "reasoning_content" not in out:
            raise RequestError(f"{name}: wanted content or tool_calls")
    if role == "tool":
        call_id = message.get("tool_call_id")
        if call_id is not None:
            check_text(call_id, f"{name}.tool_call_id")
            out["tool_call_id"] = call_id
    if message.get("name") is not None:
        check_text(message["name"], f"{name}.name")
        out["name"] = message["name"]
    return out


def content_text(name: str, content: Any) -> str:
    """A text, or a list of text parts joined."""
    if isinstance(content, list):
        return "".join(part_text(f"{name}[{at}]", part) for at, part in enumerate(content))
    check_text(content, name)
    return content


def part_text(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        raise RequestError(
            f"{name}: got {shown(part)}, wanted a text part (only text is supported)"
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    check_text(text, f"{name}.text")
    assert isinstance(text, str)
    return text


def tool_call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call in an assistant's message. Arguments are JSON text or an object; the template says
    which it wants (text/tools.py).
    """
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def check_function(name: str, function: Any) -> dict[str, Any]:
    """A tool in OpenAI's chat form from its function object."""
    if not isinstance(function, dict):
        raise RequestError(f"{name}: got {shown(function)}, wanted an object with a name")
    given = function.get("name")
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise RequestError(
            f"{name}.name: got {shown(given)}, wanted 1 to {MAX_NAME_CHARS} letters, digits and "
            "_ . : -"
        )
    out: dict[str, Any] = {"name": given}
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None:
        check_text(description, f"{name}.description")
        out["description"] = description
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"{name}.parameters: got {shown(parameters)}, wanted a JSON schema")
    out["parameters"] = parameters or {"type": "object", "properties": {}}
    strict = function.get("strict")
    if strict is not None:
        if not isinstance(strict, bool):
            raise RequestError(f"{name}.strict: got {shown(strict)}, wanted true or false")
        out["strict"] = strict
    return {"type": "function", "function": out}


def join_texts(texts: Iterable[str]) -> str:
    return "\n".join(t for t in texts if t)


def _check_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or len(calls) > MAX_TOOL_CALLS:
        raise RequestError(f"{name}: got {shown(calls)}, wanted a list of tool calls")
    out = []
    for at, call in enumerate(calls):
        where = f"{name}[{at}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}: got {shown(call)}, wanted a call of a function by name")
        call_id = call.get("id")
        check_text(function["name"], f"{where}.function.name")
        if call_id is not None:
            check_text(call_id, f"{where}.id")
        arguments = function.get("arguments") or "{}"
        if not isinstance(arguments, (str, dict)):
            raise RequestError(
                f"{where}.function.arguments: got {shown(arguments)}, wanted JSON text"
            )
        out.append(tool_call(call_id or f"call_{at}", function["name"], arguments))
    return out
