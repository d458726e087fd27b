"""How many sequences may decode together, and how much of a prompt may be computed between two of
their tokens, so that a token takes no longer than a deployment wants it to.

Both are learned from steps as they were measured: the batch grows by one row at a time for as long
as its steps stay within the target, and a prompt's chunk is the largest compiled size that fits
beside a decode. One row and the smallest size are always allowed. Pure: seconds come in as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of a new measurement: a few steps correct an estimate, one odd step does not.
_WEIGHT = 0.2
# Decodes until a size that was too slow is tried again: contexts and the machine's other work
# change, and what is never tried is never measured. At 20 steps a second half a minute.
_RETRY_STEPS = 512


class TpotTarget:
    """target_s: seconds per token wanted. chunk_sizes: tokens that prefill programs are compiled
    for, ascending.
    """

    def __init__(self, target_s: float, chunk_sizes: Sequence[int]) -> None:
        self.target_s = target_s
        self._sizes = tuple(chunk_sizes)
        self._decode: dict[int, float] = {}
        self._prefill: dict[int, float] = {}
        self._seen: dict[int, int] = {}  # the decode in which a row count was last measured
        self._num_decodes = 0

    def observe(self, kind: str, num_tokens: int, seconds: float) -> None:
        """What a step took that had no program to compile; others than decode and prefill are
        nothing to learn from.
        """
        if kind == "decode":
            self._num_decodes += 1
            self._seen[num_tokens] = self._num_decodes
            _learn(self._decode, num_tokens, seconds)
        elif kind == "prefill":
            _learn(self._prefill, self._size(num_tokens), seconds)

    def max_rows(self, most: int) -> int:
        """Sequences that may be running."""
        for rows, seen in list(self._seen.items()):
            if self._num_decodes - seen > _RETRY_STEPS and self._decode[rows] > self.target_s:
                del self._decode[rows], self._seen[rows]
        good = max((n for n, s in self._decode.items() if s <= self.target_s), default=0)
        slow = [n for n, s in self._decode.items() if s > self.target_s and n > good]
        return max(1, min(most, good + 1, min(slow, default=most + 1) - 1))

    def chunk_tokens(self, num_decoding: int) -> int:
        """Of prompts, in the step between two decodes of so many rows."""
        room = self.target_s - self._decode_s(num_decoding)
        best, known = self._sizes[0], 0.0
        for i, size in enumerate(self._sizes):
            # Not measured yet: at most as many times longer as it is larger.
            factor = size / self._sizes[i - 1] if i else 0.0
            known = self._prefill.get(size, known * factor)
            if i and (known == 0.0 or known > room):
                break
            best = size
        return best

    def describe(self) -> str:
        """One line for the start-up report."""
        return (
            f"a token is to take at most {self.target_s * 1e3:g} ms (target_tpot_ms): the batch "
            "and the chunks of prompts between two tokens grow as far as measured steps allow"
        )

    def _size(self, num_tokens: int) -> int:
        return next((s for s in self._sizes if s >= num_tokens), self._sizes[-1])

    def _decode_s(self, rows: int) -> float:
        """Measured, or of the next smaller batch that was."""
        return self._decode.get(max((n for n in self._decode if n <= rows), default=0), 0.0)


def _learn(figures: dict[int, float], key: int, seconds: float) -> None:
    old = figures.get(key)
    figures[key] = seconds if old is None else old + _WEIGHT * (seconds - old)
