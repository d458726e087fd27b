"""Text as it grows, token by token: never half a character, never part of a stop string.

Bytes that do not yet make a character wait inside an incremental UTF-8 decoder; characters that
could be the beginning of a stop string wait until they are not. What was given out is never taken
back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jaxmoe.text.tags import unfinished


class Detokenizer:
    """The text of one completion.

    text: all that was given out so far. stopped_by: the stop string that ended it, or None.
    """

    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self.text = ""
        self.stopped_by: str | None = None
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes, *, may_stop: bool = True) -> str:
        """Adds a token's bytes and returns the text that became certain, possibly none.

        may_stop: whether a stop string that this piece completes ends the text (false before
        min_tokens). After a stop nothing more is given out.
        """
        if self.stopped_by is not None:
            return ""
        return self._take(self._decoder.decode(piece), may_stop)

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come, and U+FFFD for
        half a character.
        """
        if self.stopped_by is not None:
            return ""
        given = self._take(self._decoder.decode(b"", final=True), may_stop=True)
        if self.stopped_by is None:
            given += self._held
            self.text += self._held
            self._held = ""
        return given

    def _take(self, new: str, may_stop: bool) -> str:
        before = len(self._held)
        pending = self._held + new
        keep = len(pending)
        if self._stops:
            found = self._first_stop(pending, before) if may_stop and new else None
            if found is not None:
                start, stop = found
                self.stopped_by = stop
                keep = start + (len(stop) if self._include_stop else 0)
                pending = pending[:keep]
            else:
                keep -= unfinished(pending, self._stops)
        given, self._held = pending[:keep], pending[keep:]
        self.text += given
        return given

    def _first_stop(self, pending: str, before: int) -> tuple[int, str] | None:
        """The stop string that is complete first; of those, the one that begins first."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            # Complete stops inside what was held came before min_tokens and no longer count.
            start = pending.find(stop, max(0, before - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])
