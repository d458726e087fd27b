"""Decides that an engine hangs: work is pending and no step was done for too long.

Pure: fed with what the pulse says and the time. A pid that exists proves nothing, and neither does
an answered ping: only steps count, and where a program is being compiled, which is none, the CPU
time that takes. What it does not do: kill anything (process_engine.py).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Patience:
    """least_s: no step is called a hang before this. factor: nor before so many times the longest
    step there was. compile_s: how long a program may take to compile, which counts as no step, as
    long as it uses the CPU.
    """

    least_s: float = 60.0
    factor: float = 10.0
    compile_s: float = 1800.0

    def limit_s(self, longest_step_s: float, *, compiling: bool) -> float:
        limit = max(self.least_s, self.factor * longest_step_s)
        return max(limit, self.compile_s) if compiling else limit


class Watchdog:
    """Ask `hung` every now and then; time is any monotonic clock's."""

    def __init__(self, patience: Patience, now_s: float) -> None:
        self._patience = patience
        self._steps = -1
        self._compiling = False
        self._since_s = now_s  # of the last sign of progress, or of having anything to do
        self._cpu_s = 0.0
        self._worked_s = now_s  # when the process was last seen to have used the CPU

    def silent_s(self, now_s: float) -> float:
        return now_s - self._since_s

    def hung(
        self,
        now_s: float,
        *,
        pending: bool,
        steps: int,
        compiling: bool,
        longest_step_s: float,
        cpu_s: float = 0.0,
    ) -> bool:
        """pending: whether anybody waits for the engine. cpu_s: that its process has used so far;
        it is looked at while compiling.
        """
        if cpu_s != self._cpu_s:
            self._cpu_s, self._worked_s = cpu_s, now_s
        if not pending or steps != self._steps or compiling != self._compiling:
            self._steps, self._compiling = steps, compiling
            self._since_s = now_s
            return False
        limit = self._patience.limit_s(longest_step_s, compiling=compiling)
        if self.silent_s(now_s) > limit:
            return True
        idle_s = now_s - max(self._worked_s, self._since_s)
        return compiling and idle_s > self._patience.limit_s(longest_step_s, compiling=False)
