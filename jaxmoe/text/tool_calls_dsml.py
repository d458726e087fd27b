"""Tool calls in DSML (dsml.py has the form): DeepSeek-V3.2 and V4.

The `string` attribute says whether a value is text as it is or JSON; where it is missing or is
neither, the tool's schema does. Strings are given out while they are written; other values when
they are complete. A forgotten opening of the block, and a forgotten end of a call, are taken as
meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.text.dsml import BLOCKS, DSML, closing, opening
from jaxmoe.text.tags import could_begin, first_of, unfinished
from jaxmoe.text.tool_calls import MAX_HEAD_CHARS, ToolCallParser
from jaxmoe.text.tool_calls_xml import dumps, escaped, functions, parameter_types, typed

_INVOKE, _PARAMETER = f"<{DSML}invoke", f"<{DSML}parameter"
_INVOKE_END, _PARAMETER_END = closing("invoke"), closing("parameter")
_NAME = re.compile(r'\s+name="([^"\n]+)"\s*')
_KEY = re.compile(r'\s+name="([^\n]+?)"(?:\s+string="([^"]*)")?\s*')


class DsmlParser(ToolCallParser):
    """See the module's docstring. format: a key of dsml.BLOCKS."""

    def __init__(
        self, format: str, tools: Sequence[Mapping[str, Any]], make_id: Callable[[], str]
    ) -> None:
        super().__init__(make_id)
        self._begin, self._end_mark = opening(BLOCKS[format]), closing(BLOCKS[format])
        self._types = {name: parameter_types(f) for name, f in functions(tools).items()}
        self._name = ""
        self._value_types: set[str] = set()
        self._first = True  # no parameter yet
        self._raw = ""
        self._state = self._text

    def _step(self) -> bool:
        return self._state()

    def _end(self) -> None:
        marks = (_INVOKE, _INVOKE_END, _PARAMETER, self._end_mark)
        if self._state == self._text or self._raw:
            self._add_content(self._raw + self._buf)
        elif self._state == self._string:
            self._add_arguments(escaped(self._buf))
        # Half a number would read as a whole one: a value that is no string stays away.
        elif self._state == self._section and not could_begin(self._buf.strip(), marks):
            self._add_content(self._buf)
        self._buf = self._raw = ""

    def _text(self) -> bool:
        """Outside of any block."""
        found = first_of(self._buf, (self._begin, _INVOKE))
        if found is None:
            held = unfinished(self._buf, (self._begin, _INVOKE))
            self._add_content(self._cut(len(self._buf) - held))
            return False
        self._add_content(self._cut(found[0]))
        self._raw = self._cut(len(self._begin)) if found[1] == self._begin else ""
        self._state = self._section
        return True

    def _section(self) -> bool:
        """Between the calls of a block."""
        word = self._buf.lstrip()
        if word.startswith(_INVOKE):
            head, closed, rest = word[len(_INVOKE) :].partition(">")
            if not closed and len(head) <= MAX_HEAD_CHARS:
                return False
            name = _NAME.fullmatch(head)
            if not closed or name is None or len(head) > MAX_HEAD_CHARS:
                return self._give_up()
            self._buf, self._raw = rest, ""
            self._name, self._first = name[1], True
            self._start_call(self._name)
            self._state = self._parameters
            return True
        if word.startswith(self._end_mark):
            self._buf = word[len(self._end_mark) :]
            self._raw = ""
            self._state = self._text
            return True
        return not could_begin(word, (_INVOKE, self._end_mark)) and self._give_up()

    def _parameters(self) -> bool:
        """Between the parameters of a call."""
        word = self._buf.lstrip()
        if word.startswith(_PARAMETER):
            head, closed, rest = word[len(_PARAMETER) :].partition(">")
            if not closed and len(head) <= MAX_HEAD_CHARS:
                return False
            key = _KEY.fullmatch(head)
            if closed and key is not None:
                self._buf = rest
                self._begin_value(key[1], key[2])
                return True
        ends = (_INVOKE_END, self._end_mark, _INVOKE)
        if could_begin(word, (_PARAMETER, *ends)) and word not in (*ends, _PARAMETER):
            return False
        self._add_arguments("{}" if self._first else "}")
        self._buf = word
        if word.startswith(_INVOKE_END):
            self._cut(len(_INVOKE_END))
        self._state = self._section
        return True

    def _begin_value(self, key: str, is_string: str | None) -> None:
        self._add_arguments(("{" if self._first else ", ") + dumps(key) + ": ")
        self._first = False
        types = self._types.get(self._name, {}).get(key, set())
        if is_string == "true" or (is_string != "false" and types <= {"string"}):
            self._add_arguments('"')
            self._state = self._string
        else:
            self._value_types = types
            self._state = self._other

    def _string(self) -> bool:
        end = self._buf.find(_PARAMETER_END)
        if end >= 0:
            self._add_arguments(escaped(self._cut(end)) + '"')
            self._cut(len(_PARAMETER_END))
            self._state = self._parameters
            return True
        held = unfinished(self._buf, (_PARAMETER_END,))
        self._add_arguments(escaped(self._cut(len(self._buf) - held)))
        return False

    def _other(self) -> bool:
        end = self._buf.find(_PARAMETER_END)
        if end < 0:
            return False
        value = self._cut(end)
        self._cut(len(_PARAMETER_END))
        self._add_arguments(typed(value, self._value_types))
        self._state = self._parameters
        return True

    def _give_up(self) -> bool:
        """What was read of a block that holds no call is content."""
        begun = self._buf.lstrip().startswith(_INVOKE)
        self._add_content(self._raw + (self._cut(self._buf.index("<") + 1) if begun else ""))
        self._raw = ""
        self._state = self._text
        return True
