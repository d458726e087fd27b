"""Traces are what Perfetto reads: complete events, named tracks, microseconds from zero."""

import json

from jaxmoe.common.trace import Span, write


def test_spans_become_complete_events_on_named_tracks(tmp_path):
    spans = [
        Span("worker 1", "unit", 7_000, 8_500),
        Span("steps", "decode", 5_000, 9_000, {"tokens": 2}),
        Span("steps", "decode", 9_500, 9_750),
    ]
    write(tmp_path / "t.json", "jaxmoe", spans, {"dropped": 0})
    told = json.loads((tmp_path / "t.json").read_text())
    events = told["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert sorted(names.values()) == ["steps", "worker 1"]
    assert [names[tid] for tid in sorted(order, key=order.__getitem__)] == ["steps", "worker 1"]
    complete = [e for e in events if e["ph"] == "X"]
    assert [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in complete] == [
        ("steps", "decode", 0.0, 4.0), ("worker 1", "unit", 2.0, 1.5),
        ("steps", "decode", 4.5, 0.25),
    ]  # fmt: skip
    assert complete[0]["args"] == {"tokens": 2} and "args" not in complete[1]
    assert told["otherData"] == {"dropped": 0} and all(e["pid"] == 1 for e in events)


def test_an_empty_trace_is_a_trace(tmp_path):
    write(tmp_path / "t.json", "jaxmoe", [])
    assert [e["ph"] for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"]] == ["M"]
