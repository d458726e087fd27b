"""GPT-2's way to write bytes as visible characters, which byte-level vocabularies use."""

from __future__ import annotations


def byte_level_table() -> dict[str, int]:
    """The visible characters and the bytes they stand for."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in visible}
    rest = (b for b in range(256) if b not in visible)
    return table | {chr(0x100 + n): b for n, b in enumerate(rest)}
