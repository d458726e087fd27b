"""The prompt whose layers are being streamed, and whether it is still wanted."""

from __future__ import annotations

from typing import Protocol

from jaxmoe.decode.batch import StepRow
from jaxmoe.request import Sequence, Status
from jaxmoe.scheduler.prefill_route import Path


class Streamer(Protocol):
    """What the engine needs of prefill/stream.py."""

    @property
    def num_layers(self) -> int: ...
    def begin(self, row: StepRow, path: Path) -> None: ...
    def advance(self) -> float: ...
    def stop(self) -> None: ...


class StreamedPrompt:
    """At most one at a time."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        self._num_preemptions = 0
        self.seconds = 0.0  # of the engine's time that the one under way has taken
        self.seq: Sequence | None = None

    @property
    def num_layers(self) -> int:
        """Of a pass; as many steps, and one more, make it."""
        return self._streamer.num_layers

    def begin(self, seq: Sequence, row: StepRow, path: Path) -> None:
        self._streamer.begin(row, path)
        self.seq, self._num_preemptions = seq, seq.num_preemptions
        self.seconds = 0.0

    def advance(self) -> float:
        """One more layer; the fraction done. What fails is dropped."""
        try:
            return self._streamer.advance()
        except BaseException:
            self.seq = None
            raise

    def drop(self) -> None:
        """Forgets it: it is done."""
        self.seq = None

    def drop_stale(self) -> None:
        """Stops what was cancelled, or had to give its pages back."""
        seq = self.seq
        if seq is None:
            return
        if seq.status is not Status.PREFILL or seq.num_preemptions != self._num_preemptions:
            self._streamer.stop()
            self.seq = None
