"""An engine's pulse: a page of memory that the engine writes while it works and the front reads
whenever it likes, so that progress and figures need no message and no lock.

Every field is 8 aligned bytes, written one at a time; a reader may see a step's figures half new,
never half a figure.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence

_STEPS, _COMPILING, _LONGEST_STEP, _NUM_STATS, _FIRST_STAT = range(5)
_BYTES = 4096


class Pulse:
    """Doubles in an anonymous shared file; `fd` is handed to the engine process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _BYTES)
        self._values = memoryview(self._memory).cast("d")

    @classmethod
    def create(cls) -> Pulse:
        fd = os.memfd_create("jaxmoe_pulse", os.MFD_CLOEXEC)
        os.ftruncate(fd, _BYTES)
        return cls(fd)

    def beat(self, longest_step_s: float) -> None:
        """Notes a step."""
        self._values[_LONGEST_STEP] = longest_step_s
        self._values[_STEPS] += 1

    def set_stats(self, stats: Mapping[str, float]) -> None:
        """Figures; the same names in the same order every time."""
        values = self._values
        assert _FIRST_STAT + len(stats) <= len(values)
        for i, value in enumerate(stats.values(), _FIRST_STAT):
            values[i] = value
        values[_NUM_STATS] = len(stats)

    def set_compiling(self, compiling: bool) -> None:
        self._values[_COMPILING] = compiling

    @property
    def steps(self) -> int:
        """Grows whenever the engine gets anything done."""
        return int(self._values[_STEPS])

    @property
    def compiling(self) -> bool:
        return bool(self._values[_COMPILING])

    @property
    def longest_step_s(self) -> float:
        return self._values[_LONGEST_STEP]

    def stats(self, names: Sequence[str]) -> dict[str, float]:
        """The figures under their names; empty before the first step."""
        count = int(self._values[_NUM_STATS])
        if count != len(names):
            return {}
        return dict(zip(names, self._values[_FIRST_STAT : _FIRST_STAT + count], strict=True))

    def close(self) -> None:
        self._values.release()
        self._memory.close()
        os.close(self.fd)
