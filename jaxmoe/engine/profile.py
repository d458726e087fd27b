"""Where the time of a step goes: seconds by part, and a trace of every thread.

The parts of a step, which add up to it:

| part | what |
|---|---|
| experts_read | routed experts: the step's thread works on weights |
| experts_wait | routed experts, the rest: grouping, hand-out, other threads' last units |
| linear | all other linear maps, their waits included |
| attention | over the KV cache, likewise |
| xla | the rest of the compiled program up to the logits: norms, routers, rope, cache writes |
| sampling | from the logits to the drawn tokens |
| dispatch | outside the program: planning, packing, JAX's call, taking results |

The operations count their own time (xla_ffi/runtime/trace.h); marks in the program tell where it
begins, has its logits, and ends. Between two steps nothing is counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.common import trace
from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi.cpu_runtime import CpuRuntime

PARTS: tuple[str, ...] = (
    "experts_read",
    "experts_wait",
    "linear",
    "attention",
    "xla",
    "sampling",
    "dispatch",
)
KINDS: tuple[str, ...] = ("prefill", "decode")
# Events kept for the file: 40 bytes each here, about 100 in it. Hundreds of a large model's steps.
MOST_EVENTS = 2_000_000

_EVENT_NAMES = ("", "unit", "wait", "program", "sampling")
_PART_NAMES = ("experts", "linear", "attention", "other")


class StepProfile:
    """Counts the parts of an engine's steps; with a path also keeps a trace.

    Raises ConfigError where the trace's folder does not exist.
    """

    def __init__(self, runtime: CpuRuntime, trace_path: Path | None = None) -> None:
        if trace_path is not None and not trace_path.parent.is_dir():
            raise ConfigError(f"profile: there is no directory {trace_path.parent}")
        self._runtime = runtime
        self._path = trace_path
        self._seconds = {kind: dict.fromkeys(PARTS, 0.0) for kind in KINDS}
        self._steps = dict.fromkeys(KINDS, 0)
        self._spans: list[trace.Span] = []
        self._taken: list[tuple[str, np.ndarray]] = []
        self._num_events = 0
        self._dropped = 0
        self._begin_ns = 0
        self._before: Mapping[str, int] = {}
        runtime.set_trace_level("seconds" if trace_path is None else "events")

    def begin(self) -> None:
        """Call at the very beginning of a step."""
        self._before = self._runtime.stats()
        self._begin_ns = time.perf_counter_ns()

    def end(self, kind: str, *, tokens: int, compiled: bool) -> None:
        """Call at the end of the step that was begun. A step that compiled counts in the trace
        alone: it would hide all others.
        """
        end_ns = time.perf_counter_ns()
        if self._path is not None:
            self._keep_trace(kind, end_ns, tokens, compiled)
        if compiled:
            return
        parts = split(self._before, self._runtime.stats(), (end_ns - self._begin_ns) / 1e9)
        for part, seconds in parts.items():
            self._seconds[kind][part] += seconds
        self._steps[kind] += 1

    def _keep_trace(self, kind: str, end_ns: int, tokens: int, compiled: bool) -> None:
        if self._num_events >= MOST_EVENTS:
            return
        name = f"{kind}, compiles" if compiled else kind
        self._spans.append(trace.Span("steps", name, self._begin_ns, end_ns, {"tokens": tokens}))
        for track, events, dropped in self._runtime.take_trace():
            self._dropped += dropped
            if len(events):
                self._taken.append((track, events))
                self._num_events += len(events)
        if self._num_events >= MOST_EVENTS:
            self._runtime.set_trace_level("seconds")

    def seconds(self, kind: str) -> Mapping[str, float]:
        """Of all steps of a kind that did not compile."""
        return self._seconds[kind]

    def snapshot(self) -> dict[str, float]:
        """For /metrics; see stats.py."""
        return {
            f'step_part_seconds_total{{kind="{kind}",part="{part}"}}': seconds
            for kind in KINDS
            for part, seconds in self._seconds[kind].items()
        }

    def describe(self) -> str:
        """For people: a step of each kind, in milliseconds and shares."""
        lines = []
        for kind in KINDS:
            count, parts = self._steps[kind], self._seconds[kind]
            total = sum(parts.values())
            if not count:
                continue
            lines.append(f"{kind}: {count} steps of {total / count * 1e3:.3f} ms")
            lines += [
                f"  {part.replace('_', ' '):14}{seconds / count * 1e3:10.3f} ms"
                f"{seconds / max(total, 1e-12):8.1%}"
                for part, seconds in parts.items()
            ]
        return "\n".join(lines) or "no step was profiled (those that compile are not counted)"

    def close(self) -> None:
        """Writes the trace, if one is wanted. Once."""
        path, self._path = self._path, None
        if path is None:
            return
        self._runtime.set_trace_level("off")
        notes: dict[str, Any] = {"threads": self._runtime.describe(), "dropped": self._dropped}
        if self._num_events >= MOST_EVENTS:
            notes["cut"] = f"nothing is kept after {self._num_events} events"
        spans = list(self._spans)
        for track, events in self._taken:
            spans += spans_of(track, events)
        trace.write(path, "jaxmoe", spans, notes)


def split(before: Mapping[str, int], after: Mapping[str, int], step_s: float) -> dict[str, float]:
    """A step's seconds by part, from the runtime's counters before and after it."""

    def spent(name: str) -> float:
        return (after[name] - before[name]) / 1e9

    program, sampling = spent("program_ns"), spent("sampling_ns")
    experts, linear, attention = (spent(f"{n}_ns") for n in ("experts", "linear", "attention"))
    read = spent("experts_busy_ns")
    return {
        "experts_read": read,
        "experts_wait": experts - read,
        "linear": linear,
        "attention": attention,
        "xla": program - sampling - experts - linear - attention,
        "sampling": sampling,
        "dispatch": step_s - program,
    }


def spans_of(track: str, events: np.ndarray) -> list[trace.Span]:
    """int64 `[n, 5]` of begin, end, kind, part and detail, as `take_trace` gives them."""
    spans = []
    for begin, end, kind, part, detail in events.tolist():
        name, words = _PART_NAMES[part], {}
        if kind == 0:
            words = {"layer" if name == "experts" else "rows": detail}
        elif kind == 1:
            name, words = f"{name} unit", {"phase": detail}
        elif kind == 2:
            name = f"{name} wait"
        else:
            name = _EVENT_NAMES[kind]
        # Programs span the operations of the thread that runs them, perhaps not the one that ends
        # them: a track of their own.
        spans.append(trace.Span("programs" if kind >= 3 else track, name, begin, end, words))
    return spans
