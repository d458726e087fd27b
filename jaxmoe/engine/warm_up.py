"""Compiles what steps may need ahead, in a thread, while requests are served.

One program at a time, in the order given. A request that needs another one meanwhile compiles that
itself (decode/programs.py), so nobody waits for more than the program that his step needs. While
there is work, each compilation is followed by a pause of PAUSE_FACTOR times its length: compilers
take cores from the steps, and cannot be interrupted. What it does not do: programs of steps in
which several requests are masked or biased, and those that stream experts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from jaxmoe.decode.batch import Prepared

_log = logging.getLogger(__name__)
# Steps are disturbed for a quarter of the time at most.
PAUSE_FACTOR = 3.0
CHECK_S = 0.05  # between looks at whether there is still work; far below any compilation


class WarmUp:
    """Begins with `start`, ends with the last program or `close`.

    Args:
        programs: in the order in which they are compiled.
        prepare: compiles a step's program, or finds it there.
        busy: whether there is work for the engine; from any thread.
    """

    def __init__(
        self,
        programs: Sequence[Prepared],
        prepare: Callable[[Prepared], object],
        busy: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._programs = tuple(programs)
        self._prepare = prepare
        self._busy = busy
        self._clock = clock
        self._done = 0
        self._seconds = 0.0
        self._compiling = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._on_progress: Callable[[], None] = lambda: None

    def start(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """on_progress: called in the thread, after each program. Once started, a second call does
        nothing.
        """
        if self._thread is None and not self._stop.is_set():
            self._on_progress = on_progress
            # No daemon: a thread inside a compiler at the interpreter's end crashes the process.
            self._thread = threading.Thread(target=self._run, name="warm-up")
            self._thread.start()

    @property
    def compiling(self) -> bool:
        """Whether it takes cores from a step now."""
        return self._compiling

    def stop(self) -> None:
        """Begins no further program."""
        self._stop.set()

    def close(self) -> None:
        """Stops, and waits for the program under way, which uses the weights."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def snapshot(self) -> dict[str, float]:
        """For metrics (stats.py)."""
        return {
            "warm_up_programs_planned": float(len(self._programs)),
            "warm_up_programs_compiled": float(self._done),
            "warm_up_seconds_total": self._seconds,
        }

    def describe(self) -> str:
        kind, tokens, *_ = self._programs[0]
        return (
            f"compiling ahead: {len(self._programs)} programs in the background, one at a time, "
            f"from the {kind} of {tokens} tokens on; requests go first"
        )

    def _run(self) -> None:
        begin = self._clock()
        for program in self._programs:
            if self._is_over():
                return
            started = self._clock()
            self._compiling = True
            try:
                self._prepare(program)
            except Exception as e:
                # The step that needs it will say so to its request.
                kind, tokens, rows, extra = program
                _log.error(
                    "compiling ahead ends at %s of %d tokens, %d rows%s: %s",
                    kind, tokens, rows, extra and f", {extra}", e,
                )  # fmt: skip
                return
            finally:
                self._compiling = False
            took = self._clock() - started
            self._done += 1
            self._seconds += took
            self._on_progress()
            self._pause(PAUSE_FACTOR * took)
        _log.info(
            "compiled ahead: %d programs in %.1f s of %.1f s",
            self._done,
            self._seconds,
            self._clock() - begin,
        )

    def _pause(self, seconds: float) -> None:
        """That long, or until there is nothing to do."""
        end = self._clock() + seconds
        while self._busy() and self._clock() < end and not self._is_over():
            self._stop.wait(CHECK_S)

    def _is_over(self) -> bool:
        # Programs that never close their engine end too.
        return self._stop.is_set() or not threading.main_thread().is_alive()


NO_FIGURES = WarmUp((), lambda program: None, lambda: False).snapshot()
