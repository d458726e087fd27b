"""The Responses API's input items in the chat form: messages, function calls and their outputs,
reasoning. What it does not do: answers (responses_api.py), stored items (nothing is stored).
"""

from __future__ import annotations

from typing import Any

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown
from jaxmoe.serving.chat_forms import content_text, tool_call
from jaxmoe.text.tokenizer import check_text

_MAX_ITEMS = 100_000
_ROLES = ("user", "assistant", "system", "developer")


def check_input(name: str, value: Any) -> list[dict[str, Any]]:
    """Messages in the chat form; consecutive calls and thoughts join the assistant's message."""
    if isinstance(value, str):
        if not value:
            raise RequestError(f"{name}: got an empty text, wanted at least one character")
        check_text(value, name)
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_ITEMS:
        raise RequestError(f"{name}: got {shown(value)}, wanted text or a list of items")
    out: list[dict[str, Any]] = []
    for at, item in enumerate(value):
        where = f"{name}[{at}]"
        if not isinstance(item, dict):
            raise RequestError(f"{where}: got {shown(item)}, wanted an item")
        kind = item.get("type", "message")
        if kind == "message":
            _message(where, item, out)
        elif kind == "function_call":
            for key in ("call_id", "name"):
                check_text(item.get(key), f"{where}.{key}")
            arguments = item.get("arguments") or "{}"
            check_text(arguments, f"{where}.arguments")
            call = tool_call(item["call_id"], item["name"], arguments)
            _assistant(out).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            check_text(item.get("call_id"), f"{where}.call_id")
            text = content_text(f"{where}.output", item.get("output"))
            out.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
        elif kind == "reasoning":
            _reasoning(where, item, out)
        else:
            raise RequestError(
                f"{where}.type: got {shown(kind)}, wanted message, function_call, "
                "function_call_output or reasoning"
            )
    return out


def _message(where: str, item: dict[str, Any], out: list[dict[str, Any]]) -> None:
    role = item.get("role")
    if role not in _ROLES:
        raise RequestError(f"{where}.role: got {shown(role)}, wanted one of {', '.join(_ROLES)}")
    text = content_text(f"{where}.content", item.get("content"))
    if role == "assistant" and out and _is_open(out[-1]):
        out[-1]["content"] += text
    else:
        out.append({"role": "system" if role == "developer" else role, "content": text})


def _is_open(message: dict[str, Any]) -> bool:
    """Whether the last message holds only thoughts so far, which the text belongs to."""
    return message["role"] == "assistant" and not message["content"] and "tool_calls" not in message


def _assistant(out: list[dict[str, Any]]) -> dict[str, Any]:
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _reasoning(where: str, item: dict[str, Any], out: list[dict[str, Any]]) -> None:
    texts = []
    for key in ("content", "summary"):
        parts = item.get(key) or []
        if not isinstance(parts, list) or any(not isinstance(p, dict) for p in parts):
            raise RequestError(f"{where}.{key}: got {shown(parts)}, wanted a list of parts")
        for p in parts:
            check_text(p.get("text"), f"{where}.{key}.text")
            texts.append(p["text"])
        if texts:
            break
    out.append({"role": "assistant", "content": "", "reasoning_content": "\n".join(texts)})
