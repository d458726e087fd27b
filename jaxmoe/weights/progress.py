"""A progress bar in bytes that many threads may push forward."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm


class ByteProgress:
    """Counts bytes done; draws a bar with bytes/s on stderr where a person can see it.

    Args:
      total: bytes to come.
      title: what is going on, in front of the bar.
      show: draw the bar; None draws it if stderr is a terminal.
      on_percent: told the percentage done whenever it is another whole number.
    """

    def __init__(
        self,
        total: int,
        title: str,
        show: bool | None = None,
        on_percent: Callable[[float], None] | None = None,
    ) -> None:
        self.total, self.done = total, 0
        self._lock = threading.Lock()
        self._start = time.perf_counter()
        show = sys.stderr.isatty() if show is None else show
        self._on_percent, self._percent = on_percent, 0
        self._bar = None
        if show:
            self._bar = tqdm(
                total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1000, smoothing=0.1
            )

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(count)
            percent = 100 * self.done // max(self.total, 1)
            if self._on_percent is not None and percent != self._percent:
                self._percent = percent
                self._on_percent(float(percent))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
