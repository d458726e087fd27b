"""Tool calls as JSON objects between tags: Qwen3 (and Qwen2.5, Hermes).

From Qwen3's chat template: `<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>`, one
block a call. Objects with their keys in another order, or with the arguments as a JSON string,
are read too, but only when they are complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from jaxmoe.text.json_scan import ObjectScan
from jaxmoe.text.tags import could_begin, unfinished
from jaxmoe.text.tool_calls import ToolCallParser

BEGIN, END = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.){1,512}")\s*,\s*"arguments"\s*:\s*(?=\{)')


class HermesParser(ToolCallParser):
    """See the module's docstring."""

    def __init__(self, make_id: Callable[[], str]) -> None:
        super().__init__(make_id)
        self._scan = ObjectScan()
        self._scanned = 0
        self._state = self._text

    def _step(self) -> bool:
        return self._state()

    def _end(self) -> None:
        if self._state == self._arguments:
            self._add_arguments(self._buf)
        elif self._state == self._object:
            self._add_content(BEGIN + self._buf)
        elif self._state == self._text:
            self._add_content(self._buf)
        elif self._buf.strip().removeprefix("}").strip():
            if not could_begin(self._buf.strip().removeprefix("}").strip(), (END,)):
                self._add_content(self._buf)
        self._buf = ""

    def _text(self) -> bool:
        at = self._buf.find(BEGIN)
        if at < 0:
            held = unfinished(self._buf, (BEGIN,))
            self._add_content(self._cut(len(self._buf) - held))
            return False
        self._add_content(self._cut(at))
        self._cut(len(BEGIN))
        self._scan, self._scanned = ObjectScan(), 0
        self._state = self._object
        return True

    def _object(self) -> bool:
        """After the opening tag, until the call's name is known."""
        head = _HEAD.match(self._buf)
        name = None if head is None else _loads(head[1])
        if head is not None and isinstance(name, str):
            self._cut(head.end())
            self._start_call(name)
            self._scan = ObjectScan()
            self._state = self._arguments
            return True
        if self._scanned == 0:
            self._scanned = len(self._buf) - len(self._buf.lstrip())
            if self._scanned == len(self._buf):
                self._scanned = 0
                return False
            if self._buf[self._scanned] != "{":
                return self._give_up()
        self._scanned += self._scan.feed(self._buf[self._scanned :])
        if self._scan.stopped:
            tag = self._buf[self._scanned :]
            if not tag.startswith(END) and could_begin(tag, (END,)):
                self._scan.skip()  # looked at again, from its `<`, with the next piece
                return False
            return self._give_up()
        if not self._scan.done:
            return False
        call = _loads(self._buf[: self._scanned])
        name = call.get("name") if isinstance(call, dict) else None
        arguments = _arguments(call.get("arguments")) if isinstance(call, dict) else None
        if not isinstance(name, str) or not name or arguments is None:
            return self._give_up()
        self._cut(self._scanned)
        self._start_call(name)
        self._add_arguments(arguments)
        self._state = self._tail
        return True

    def _arguments(self) -> bool:
        self._add_arguments(self._cut(self._scan.feed(self._buf)))
        if self._scan.done or (self._scan.stopped and self._buf.startswith(END)):
            self._state = self._tail
            return True
        if not self._scan.stopped or could_begin(self._buf, (END,)):
            return False
        self._scan.skip()
        self._add_arguments(self._cut(1))
        return True

    def _tail(self) -> bool:
        """After the arguments, up to the closing tag. Other keys of the object are dropped."""
        at = self._buf.find(END)
        if at < 0:
            return False
        between = self._cut(at).strip()
        self._cut(len(END))
        if between not in ("", "}") and not (between.startswith(",") and between.endswith("}")):
            self._add_content(between)
        self._state = self._text
        return True

    def _give_up(self) -> bool:
        self._add_content(BEGIN)
        self._state = self._text
        return True


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _arguments(value: object) -> str | None:
    """JSON text of a call's arguments; None where they are none."""
    if isinstance(value, str):
        text, value = value, _loads(value)
        return text if isinstance(value, dict) else None
    if value is None:
        return "{}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None
