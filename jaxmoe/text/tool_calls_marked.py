"""Tool calls between marks that are single tokens: DeepSeek V3, R1, V3.1 and Kimi-K2.

* DeepSeek-V3 and R1 (their chat templates)::

      <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
      ```json
      {...}
      ```<｜tool▁call▁end｜>
      <｜tool▁call▁begin｜>...<｜tool▁call▁end｜><｜tool▁calls▁end｜>

* DeepSeek-V3.1 (model card), chained without anything between::

      <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>

* Kimi-K2 (tool_call_guidance.md of its model card)::

      <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>
      {...}<|tool_call_end|><|tool_calls_section_end|>

  The id `functions.NAME:0` is the model's own and is kept: it wants it back with the result.

A forgotten section mark, missing fence or missing arguments are taken as meant.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from jaxmoe.text.json_scan import ObjectScan
from jaxmoe.text.tags import could_begin, first_of, unfinished
from jaxmoe.text.tool_calls import MAX_HEAD_CHARS, ToolCallParser


@dataclasses.dataclass(frozen=True)
class Marks:
    """How a family writes calls. separator: between head and arguments. head: its groups are the
    name and perhaps the id. fenced: the arguments are in a code block, after the name.
    """

    section_begin: str
    section_end: str
    call_begin: str
    call_end: str
    separator: str
    head: re.Pattern[str]
    fenced: bool = False


def _deepseek(name: str) -> str:
    return f"<\uff5ctool\u2581{name}\uff5c>"


_NAME = r"(?P<name>[^\s<>|\uff5c]+)"
DEEPSEEK_V3 = Marks(
    _deepseek("calls\u2581begin"),
    _deepseek("calls\u2581end"),
    _deepseek("call\u2581begin"),
    _deepseek("call\u2581end"),
    _deepseek("sep"),
    re.compile(r"\s*function\s*"),
    fenced=True,
)
DEEPSEEK_V31 = dataclasses.replace(DEEPSEEK_V3, head=re.compile(rf"\s*{_NAME}\s*"), fenced=False)
KIMI_K2 = Marks(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
    re.compile(r"\s*(?:(?P<id>(?:functions\.)?(?P<of_id>[^\s<>|]+?):\d+)|(?:functions\.)?"
               rf"{_NAME})\s*"),
)  # fmt: skip
# The name and the opening of the code block of DeepSeek-V3; the block is sometimes forgotten.
_FENCED_HEAD = re.compile(rf"\s*{_NAME}\s*(?:```(?:json)?\s*)?")
_FENCE = "```"
_WAIT_CHARS = MAX_HEAD_CHARS + 64  # a mark that begins within MAX_HEAD_CHARS has arrived by then


class MarkedParser(ToolCallParser):
    """See the module's docstring; `marks` is one of DEEPSEEK_V3, DEEPSEEK_V31 and KIMI_K2."""

    def __init__(self, marks: Marks, make_id: Callable[[], str]) -> None:
        super().__init__(make_id)
        self._marks = marks
        self._raw = ""  # what was read of a section or call and is content if the call is none
        self._name: str | None = None
        self._id: str | None = None
        self._scan = ObjectScan()
        self._state = self._text

    def _step(self) -> bool:
        return self._state()

    def _end(self) -> None:
        if self._state == self._arguments:
            self._add_arguments(self._buf)
        elif self._state == self._text:
            self._add_content(self._buf)
        elif self._state == self._tail:
            rest = self._buf.strip("`").strip()
            if not could_begin(rest, (self._marks.call_end, self._marks.section_end)):
                self._add_content(self._buf)
        elif self._raw or self._buf.strip():
            self._add_content(self._raw + self._buf)
        self._buf = self._raw = ""

    def _text(self) -> bool:
        """Outside of any section."""
        openers = (self._marks.section_begin, self._marks.call_begin)
        found = first_of(self._buf, openers)
        if found is None:
            held = unfinished(self._buf, openers)
            self._add_content(self._cut(len(self._buf) - held))
            return False
        self._add_content(self._cut(found[0]))
        self._raw = self._cut(len(found[1]))
        self._enter(self._section if found[1] == self._marks.section_begin else self._head)
        return True

    def _section(self) -> bool:
        """Between the calls of a section."""
        word = self._buf.lstrip()
        for mark in (self._marks.call_begin, self._marks.section_end):
            if word.startswith(mark):
                self._raw += self._cut(len(self._buf) - len(word) + len(mark))
                if mark == self._marks.call_begin:
                    self._enter(self._head)
                else:
                    self._raw = ""
                    self._enter(self._text)
                return True
        if could_begin(word, (self._marks.call_begin, self._marks.section_end)):
            return False
        return self._give_up()

    def _head(self) -> bool:
        """After a call's opening mark, up to the separator."""
        marks = self._marks
        others = (marks.call_begin, marks.call_end, marks.section_begin, marks.section_end)
        found = first_of(self._buf, (marks.separator, *others))
        if found is None:
            return len(self._buf) > _WAIT_CHARS and self._give_up()
        at, mark = found
        head = marks.head.fullmatch(self._buf[:at])
        if mark != marks.separator or head is None or at > MAX_HEAD_CHARS:
            return self._give_up()
        if not marks.fenced:
            self._id = head.groupdict().get("id")
            self._name = head.groupdict().get("of_id") or head["name"]
        self._raw += self._cut(at + len(mark))
        self._enter(self._opening)
        return True

    def _opening(self) -> bool:
        """After the separator, up to the arguments' opening brace."""
        at = self._buf.find("{")
        end = self._buf.find(self._marks.call_end)
        if at < 0 and end < 0:
            return len(self._buf) > _WAIT_CHARS and self._give_up()
        empty = at < 0 or 0 <= end < at
        head = self._buf[: end if empty else at]
        if empty and self._marks.fenced:
            head = head.rstrip().removesuffix(_FENCE)
        name = self._name
        if self._marks.fenced:
            found = _FENCED_HEAD.fullmatch(head)
            name = found["name"] if found else None
        elif head.strip():
            name = None
        if name is None or len(head) > MAX_HEAD_CHARS:
            return self._give_up()
        self._start_call(name, self._id)
        self._name = self._id = None
        self._raw = ""
        self._cut(end if empty else at)
        if empty:
            self._add_arguments("{}")
        self._scan = ObjectScan()
        self._enter(self._tail if empty else self._arguments)
        return True

    def _arguments(self) -> bool:
        """Inside the arguments' object; marks inside its strings are text."""
        self._add_arguments(self._cut(self._scan.feed(self._buf)))
        if self._scan.done:
            self._enter(self._tail)
            return True
        if not self._scan.stopped:
            return False
        if self._buf.startswith(self._marks.call_end):
            self._enter(self._tail)
            return True
        if could_begin(self._buf, (self._marks.call_end,)):
            return False
        self._scan.skip()
        self._add_arguments(self._cut(1))
        return True

    def _tail(self) -> bool:
        """After the arguments, up to the call's closing mark, which is sometimes forgotten; what
        else is there is content.
        """
        marks = self._marks
        found = first_of(self._buf, (marks.call_end, marks.call_begin, marks.section_end))
        if found is None:
            return False
        between = self._cut(found[0])
        if found[1] == marks.call_end:
            self._cut(len(found[1]))
        if between.strip() not in ("", _FENCE):
            self._add_content(between)
        self._enter(self._section)
        return True

    def _give_up(self) -> bool:
        """What was read of this call is content; goes on after it."""
        self._add_content(self._raw)
        self._raw = ""
        self._name = self._id = None
        self._enter(self._text)
        return True

    def _enter(self, state: Callable[[], bool]) -> None:
        self._state = state
