"""Tool calls apart from the content, as the text is written: what all formats share.

A parser takes pieces of text (the answer part, see reasoning.py) and returns content and
OpenAI-style deltas of calls: the first delta of a call has its index, id and name, all of them
have pieces of the arguments' JSON text. Parsers read the marks that models write around calls,
and some tokenizers hold these as special tokens: parse text that was written with
`SamplingParams(skip_special_tokens=False)`.

What a model writes is never trusted and never raises. A call whose head cannot be read (no name,
no opening brace) is content, marks and all. Arguments are handed on as they are written, also
where they are no valid JSON or end early: what was given out cannot be taken back, and OpenAI's
contract tells clients to expect it. White space around calls belongs to the format and is dropped.
"""

from __future__ import annotations

import abc
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.text.dsml import BLOCKS, opening

MAX_HEAD_CHARS = 512  # of a call before its arguments; OpenAI's names have at most 64


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """A part of a call. id and name: on the first part only. arguments: a piece of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclasses.dataclass(frozen=True)
class ToolDelta:
    """What a piece of text added: content, then calls (one delta a call at most)."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


def new_call_id() -> str:
    """An id as OpenAI's look; unique, for clients send it back with the result."""
    return "call_" + secrets.token_hex(12)


class ToolCallParser(abc.ABC):
    """One completion's text. Subclasses implement `_step` and `_end` over `self._buf`."""

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self._make_id = make_id
        self._buf = ""
        self._content = ""
        self._space = ""  # white space that is content only if more content follows
        self._after_call = False
        self._calls: list[ToolCallDelta] = []
        self.num_calls = 0

    def feed(self, text: str) -> ToolDelta:
        """Takes the next piece; returns what became certain."""
        self._buf += text
        while self._step():
            pass
        return self._given()

    def finish(self) -> ToolDelta:
        """The rest: what was held back for a mark or a head that did not come whole."""
        self._end()
        if not self.num_calls:
            self._content += self._space
        self._space = ""
        return self._given()

    @abc.abstractmethod
    def _step(self) -> bool:
        """Uses up some of the buffer; False when more text is needed."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Uses up the whole buffer, for nothing follows."""

    def _given(self) -> ToolDelta:
        delta = ToolDelta(self._content, tuple(self._calls))
        self._content, self._calls = "", []
        return delta

    def _cut(self, count: int) -> str:
        text, self._buf = self._buf[:count], self._buf[count:]
        return text

    def _add_content(self, text: str) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._content += kept
        if kept:
            self._after_call = False

    def _start_call(self, name: str, call_id: str | None = None) -> None:
        self._space = ""
        self._after_call = True
        self._calls.append(ToolCallDelta(self.num_calls, call_id or self._make_id(), name))
        self.num_calls += 1

    def _add_arguments(self, text: str) -> None:
        if not text:
            return
        index = self.num_calls - 1
        if self._calls and self._calls[-1].index == index:
            last = self._calls.pop()
            self._calls.append(dataclasses.replace(last, arguments=last.arguments + text))
        else:
            self._calls.append(ToolCallDelta(index, arguments=text))


TOOL_FORMATS = (
    "deepseek_v3",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "hermes",
    "kimi_k2",
    "qwen3_coder",
)


def choose_tool_format(template: str | None) -> str | None:
    """The format that a checkpoint's chat template speaks; None where it knows no tool calls.

    The marks tell the families apart, and DeepSeek's code fence its generations.
    """
    if template is None:
        return None
    for name, block in BLOCKS.items():
        if opening(block) in template:
            return name
    if "<\uff5ctool\u2581call" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "<|tool_call" in template:
        return "kimi_k2"
    if "<function=" in template:
        return "qwen3_coder"
    return "hermes" if "<tool_call>" in template else None


def make_tool_parser(
    format: str,
    tools: Sequence[Mapping[str, Any]] = (),
    make_id: Callable[[], str] = new_call_id,
) -> ToolCallParser:
    """A parser for one completion. tools: OpenAI's list; qwen3_coder and DeepSeek's newer ones need
    the parameters' types.

    Raises ConfigError for an unknown format.
    """
    from jaxmoe.text.tool_calls_dsml import DsmlParser
    from jaxmoe.text.tool_calls_json import HermesParser
    from jaxmoe.text.tool_calls_marked import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2, MarkedParser
    from jaxmoe.text.tool_calls_xml import QwenCoderParser

    marked = {"deepseek_v3": DEEPSEEK_V3, "deepseek_v31": DEEPSEEK_V31, "kimi_k2": KIMI_K2}
    if format in marked:
        return MarkedParser(marked[format], make_id)
    if format == "hermes":
        return HermesParser(make_id)
    if format in BLOCKS:
        return DsmlParser(format, tools, make_id)
    if format == "qwen3_coder":
        return QwenCoderParser(tools, make_id)
    raise ConfigError(f"tool format: got {format!r}, wanted one of {', '.join(TOOL_FORMATS)}")
