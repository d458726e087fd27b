"""Chrome's trace format, which https://ui.perfetto.dev opens: spans on named tracks.

What it does not do: decide what is traced (engine/profile.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Span(NamedTuple):
    """begin_ns, end_ns: of CLOCK_MONOTONIC, as `time.perf_counter_ns` has it on Linux."""

    track: str
    name: str
    begin_ns: int
    end_ns: int
    detail: Mapping[str, Any] = {}


def write(path: Path, process: str, spans: Iterable[Span], notes: Mapping[str, Any] = {}) -> None:
    """Writes a JSON object trace. Times are microseconds from the first span; spans of a track must
    nest or follow one another. notes: shown with the trace's metadata.
    """
    ordered = sorted(spans, key=lambda s: (s.begin_ns, -s.end_ns))
    zero = ordered[0].begin_ns if ordered else 0
    tracks: dict[str, int] = {}
    for span in ordered:
        tracks.setdefault(span.track, len(tracks) + 1)
    # In the order of their names, the steps' own first.
    ranks = {
        name: rank for rank, name in enumerate(sorted(tracks, key=lambda t: (t != "steps", t)))
    }
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": process}}
    ]
    for name, tid in tracks.items():
        about: dict[str, Any] = {"ph": "M", "pid": 1, "tid": tid}
        events.append(about | {"name": "thread_name", "args": {"name": name}})
        events.append(about | {"name": "thread_sort_index", "args": {"sort_index": ranks[name]}})
    for span in ordered:
        event = {
            "ph": "X",
            "pid": 1,
            "tid": tracks[span.track],
            "name": span.name,
            "ts": (span.begin_ns - zero) / 1e3,
            "dur": (span.end_ns - span.begin_ns) / 1e3,
        }
        events.append(event | {"args": dict(span.detail)} if span.detail else event)
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(notes)}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
