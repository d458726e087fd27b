"""Looking for markers in a text that arrives in pieces: what is certainly none, and what could
still become one.
"""

from __future__ import annotations

from collections.abc import Iterable


def unfinished(text: str, markers: Iterable[str]) -> int:
    """Length of the longest end of `text` that begins a marker without completing it."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


def first_of(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Where the first marker in `text` begins, and which it is; the longer of two that begin
    together.
    """
    found = [(at, -len(m), m) for m in markers if (at := text.find(m)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def could_begin(text: str, markers: Iterable[str]) -> bool:
    """Whether `text` is the beginning of a marker, or empty."""
    return any(marker.startswith(text) for marker in markers)
