"""The prompt that the prefill worker is computing, and whether it is still wanted."""

from __future__ import annotations

from typing import Protocol

from jaxmoe.decode.batch import StepRow
from jaxmoe.request import Sequence, Status
from jaxmoe.scheduler.scheduler import StepPlan

# How long an engine that has nothing else to do waits for the worker at a time: what comes in
# meanwhile wakes it.
WAIT_S = 0.05


class Worker(Protocol):
    """What the engine needs of engine/prefill_worker.py."""

    @property
    def usable(self) -> bool: ...
    @property
    def num_layers(self) -> int: ...
    def begin(self, row: StepRow) -> None: ...
    def poll(self) -> float: ...
    def wait(self, timeout_s: float) -> None: ...
    def wake(self) -> None: ...
    def stop(self) -> None: ...


class AsidePrompt:
    """At most one at a time. plan: of the prompt under way, or None."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.plan: StepPlan | None = None
        self.begun_s = 0.0
        self._num_preemptions = 0

    @property
    def seq(self) -> Sequence | None:
        return None if self.plan is None else self.plan.rows[0].seq

    def begin(self, plan: StepPlan, row: StepRow, now: float) -> None:
        self.worker.begin(row)
        self.plan, self.begun_s = plan, now
        self._num_preemptions = plan.rows[0].seq.num_preemptions

    def poll(self) -> float:
        """Which fraction is there. What fails is dropped."""
        try:
            done = self.worker.poll()
        except BaseException:
            self.plan = None
            raise
        return done

    def drop(self) -> None:
        """Forgets it: it is done."""
        self.plan = None

    def drop_stale(self) -> None:
        """Stops what was cancelled, or had to give its pages back."""
        seq = self.seq
        if seq is None:
            return
        if seq.status is not Status.PREFILL or seq.num_preemptions != self._num_preemptions:
            self.worker.stop()
            self.plan = None
