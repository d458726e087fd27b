"""Anthropic's messages in the chat form: content blocks to texts, tool calls and tool results.

Blocks of text, tool_use, tool_result, thinking are understood; images and documents are refused.
The system prompt loses the billing header that a coding agent changes with every request, for it
would spoil the prefix cache. What it does not do: answers (messages_api.py).
"""

from __future__ import annotations

from typing import Any

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown
from jaxmoe.serving.chat_forms import join_texts, tool_call
from jaxmoe.text.tokenizer import check_text

_BILLING_HEADER = "x-anthropic-billing-header:"
_MAX_BLOCKS = 100_000


def check_system(name: str, value: Any) -> str:
    """The system prompt as one text."""
    if isinstance(value, str):
        check_text(value, name)
        texts = [value]
    else:
        texts = [_text_block(f"{name}[{i}]", b) for i, b in enumerate(_blocks(name, value))]
    return join_texts(t for t in map(_without_billing_header, texts) if t.strip())


def _without_billing_header(text: str) -> str:
    lines = text.split("\n")
    kept = [line for line in lines if not line.lstrip().lower().startswith(_BILLING_HEADER)]
    return text if len(kept) == len(lines) else "\n".join(kept)


def check_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Messages in the chat form; tool results become messages of their own."""
    if not isinstance(value, list):
        raise RequestError(f"{name}: got {shown(value)}, wanted a list of messages")
    out: list[dict[str, Any]] = []
    for at, message in enumerate(value):
        where = f"{name}[{at}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"{where}.role: got {shown(role)}, wanted user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            check_text(content, f"{where}.content")
            out.append({"role": role, "content": content})
        elif role == "assistant":
            out.append(_assistant(f"{where}.content", _blocks(f"{where}.content", content)))
        else:
            out += _user(f"{where}.content", role, _blocks(f"{where}.content", content))
    return out


def _assistant(name: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for at, block in enumerate(blocks):
        where, kind = f"{name}[{at}]", block.get("type")
        if kind == "thinking":
            check_text(block.get("thinking"), f"{where}.thinking")
            thoughts.append(block["thinking"])
        elif kind == "redacted_thinking":
            continue
        elif kind == "tool_use":
            for key in ("id", "name"):
                check_text(block.get(key), f"{where}.{key}")
            arguments = block.get("input") or {}
            if not isinstance(arguments, dict):
                raise RequestError(f"{where}.input: got {shown(arguments)}, wanted an object")
            calls.append(tool_call(block["id"], block["name"], arguments))
        else:
            texts.append(_text_block(where, block))
    out: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        out["reasoning_content"] = "\n".join(thoughts)
    if calls:
        out["tool_calls"] = calls
    return out


def _user(name: str, role: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool results first, as they answer what came before; then the text."""
    texts, results = [], []
    for at, block in enumerate(blocks):
        where = f"{name}[{at}]"
        if block.get("type") == "tool_result":
            call_id, content = block.get("tool_use_id"), block.get("content")
            check_text(call_id, f"{where}.tool_use_id")
            if content is None:
                text = ""
            elif isinstance(content, str):
                check_text(content, f"{where}.content")
                text = content
            else:
                inner = _blocks(f"{where}.content", content)
                text = join_texts(
                    _text_block(f"{where}.content[{i}]", b) for i, b in enumerate(inner)
                )
            results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            texts.append(_text_block(where, block))
    out = results
    if texts or not results:
        out.append({"role": role, "content": join_texts(texts)})
    return out


def _blocks(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > _MAX_BLOCKS:
        raise RequestError(f"{name}: got {shown(value)}, wanted text or a list of content blocks")
    for at, block in enumerate(value):
        if not isinstance(block, dict):
            raise RequestError(f"{name}[{at}]: got {shown(block)}, wanted a content block")
    return value


def _text_block(name: str, block: dict[str, Any]) -> str:
    if block.get("type") != "text":
        raise RequestError(
            f"{name}.type: got {shown(block.get('type'))}, wanted a text block (images and "
            "documents are not supported)"
        )
    check_text(block.get("text"), f"{name}.text")
    return block["text"]
