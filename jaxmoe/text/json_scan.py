"""Where a JSON object that arrives in pieces ends, without parsing it."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'[{}\[\]"<]')
_INSIDE = re.compile(r'["\\]')


class ObjectScan:
    """Follows one object from its opening brace.

    done: its closing brace was seen. stopped: a `<` outside of strings was seen, which no JSON
    has, so that a tag may begin there; `skip` goes on past it.
    """

    def __init__(self) -> None:
        self.done = False
        self.stopped = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object (all, unless done or stopped)."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return len(text)
            at, char = found.end(), found.group()
            if self._in_string:
                self._escaped = char == "\\"
                self._in_string = self._escaped
            elif char == '"':
                self._in_string = True
            elif char == "<":
                self.stopped = True
                return at - 1
            else:
                self._depth += 1 if char in "{[" else -1
                if self._depth <= 0:
                    self.done = True
                    return at
        return at

    def skip(self) -> None:
        """Goes on after a `<` that began no tag."""
        self.stopped = False
