"""Ways to cut a text into pieces, for parsers that must not care."""

from __future__ import annotations

import random
from collections.abc import Iterator


def splits(text: str, *, rounds: int = 20) -> Iterator[list[str]]:
    """Whole, one character at a time, at every single place, at every pair of places of a short
    text, and at random places.
    """
    yield [text]
    yield list(text)
    n = len(text)
    for i in range(1, n):
        yield [text[:i], text[i:]]
    if n <= 60:
        for i in range(1, n):
            for j in range(i + 1, n):
                yield [text[:i], text[i:j], text[j:]]
    rng = random.Random(n)
    for _ in range(rounds):
        cuts = sorted(rng.sample(range(n + 1), min(n, rng.randint(1, 12))))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
