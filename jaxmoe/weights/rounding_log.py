"""What rounding changed in a conversion, piece by piece, so that one that was interrupted can still
say it of all its pieces.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jaxmoe.quant.int4 import Int4


@dataclasses.dataclass
class Rounded:
    """Of a piece: sums of squares of the errors and of the weights, and the largest error of a
    matrix as a share of its root mean square.
    """

    piece: str
    error: float = 0.0
    total: float = 0.0
    worst: float = 0.0

    def add(self, made: Int4) -> None:
        self.error += made.error
        self.total += made.total
        self.worst = max(self.worst, _share(made.error, made.total))


class RoundingLog:
    """A line of `file` for every piece that is written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._pieces: dict[str, Rounded] = {}

    def read(self) -> set[str]:
        """The pieces noted by an earlier run; a line that is not whole is of none."""
        if not self.file.exists():
            return set()
        for line in self.file.read_text().splitlines():
            try:
                noted = Rounded(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self._pieces[noted.piece] = noted
        return set(self._pieces)

    def begin(self, piece: str) -> Rounded:
        return Rounded(piece)

    def add(self, rounded: Rounded) -> None:
        self._pieces[rounded.piece] = rounded
        with self.file.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(rounded)) + "\n")

    def describe(self, source: str, target: str) -> str:
        error = sum(piece.error for piece in self._pieces.values())
        total = sum(piece.total for piece in self._pieces.values())
        worst = max((piece.worst for piece in self._pieces.values()), default=0.0)
        return (
            f"experts rounded from {source} to {target}: root mean square error "
            f"{_share(error, total):.2%} of the weights', {worst:.2%} in the worst matrix"
        )


def _share(error: float, total: float) -> float:
    return (error / total) ** 0.5 if total > 0 else 0.0
