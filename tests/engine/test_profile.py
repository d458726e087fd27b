"""Where the time of a step goes: the parts add up to it, and the trace has every thread."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from jaxmoe import LLM, SamplingParams
from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine import profile
from jaxmoe.engine.profile import KINDS, PARTS, StepProfile, spans_of, split
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.serving.metrics import engine_families

PROGRAMS = Path(__file__).parents[2] / "build" / "test_programs"


def answer(**options):
    """A demo model's figures and profile after some steps; each shape compiled before it counts."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(max_model_len=128, max_num_seqs=2, num_threads=2, cache_dir=str(PROGRAMS),
             show_progress=False, prefix_cache=False, **options) as llm:  # fmt: skip
        outputs = [llm.generate("And he said", params).text for _ in range(3)]
        return outputs, llm.engine.stats(), llm.engine.profile


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    outputs, stats, found = answer(profile=str(path))
    return outputs, stats, found, json.loads(path.read_text())


def test_the_parts_add_up_to_the_step(traced):
    _, stats, found, _ = traced
    for kind in KINDS:
        seconds = found.seconds(kind)
        assert tuple(seconds) == PARTS
        # Each is measured apart from the others: none is what would be left of a negative rest.
        assert all(value >= 0 for value in seconds.values()), seconds
        assert seconds["linear"] > 0 and seconds["experts_read"] > 0
        assert stats[f'step_part_seconds_total{{kind="{kind}",part="linear"}}'] == seconds["linear"]
    text = found.describe()
    assert "decode: 20 steps" in text  # 3 x 7 without the one that compiled
    assert "experts wait" in text


def test_the_sum_is_the_engines_own_step_time(traced):
    """Against a clock that the parts know nothing of: the trace's steps are those of the engine."""
    _, stats, found, told = traced
    steps = [e for e in told["traceEvents"] if e["ph"] == "X" and e["name"] == "decode"]
    total = sum(found.seconds("decode").values())
    assert total == pytest.approx(sum(e["dur"] for e in steps) / 1e6, rel=1e-3)
    # The engine's figure ends a little before the step does (its texts are made after it), and has
    # the step that compiled.
    without = stats['step_seconds_total{kind="prefill"}'], sum(found.seconds("prefill").values())
    assert without[0] > 0 and without[1] > 0


def test_the_trace_has_every_thread_and_nests(traced):
    told = traced[3]
    names = {e["tid"]: e["args"]["name"] for e in told["traceEvents"] if e["name"] == "thread_name"}
    assert {"steps", "programs", "worker 1"} <= set(names.values())
    assert any(name.startswith("caller") for name in names.values())
    assert told["otherData"]["dropped"] == 0
    tracks = collections.defaultdict(list)
    for e in told["traceEvents"]:
        if e["ph"] == "X":
            tracks[names[e["tid"]]].append((e["ts"], e["ts"] + e["dur"], e["name"]))
    kinds = {name for spans in tracks.values() for _, _, name in spans}
    assert {"experts", "linear", "attention", "experts unit", "program", "sampling"} <= kinds
    for track, spans in tracks.items():
        open_until = []
        for begin, end, name in sorted(spans, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= begin + 1e-3:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3, (track, name)
            open_until.append(end)


def test_texts_are_the_same_and_nothing_is_counted_without(traced):
    outputs, stats, found = answer()
    assert outputs == traced[0] and found is None
    assert not any(name.startswith("step_part") for name in stats)
    with CpuRuntime(num_threads=1) as runtime:
        assert all(runtime.stats()[name] == 0 for name in ("linear_ns", "program_ns"))
        assert runtime.take_trace() == []


def test_metrics_have_a_family_of_parts(traced):
    families = {f.name: f for f in engine_families(traced[1])}
    family = families["jaxmoe_step_part_seconds"]
    assert family.type == "counter"
    labels = [(s.labels["kind"], s.labels["part"]) for s in family.samples]
    assert labels == [(kind, part) for kind in KINDS for part in PARTS]


def test_split():
    names = ("program", "sampling", "experts", "experts_busy", "linear", "attention")
    before = {f"{name}_ns": 5 for name in names}
    spent = dict(zip(names, (900, 50, 300, 200, 250, 100), strict=True))
    after = {f"{name}_ns": 5 + spent[name] * 1_000_000 for name in names}
    parts = split(before, after, 1.0)
    assert parts == pytest.approx(
        {"experts_read": 0.2, "experts_wait": 0.1, "linear": 0.25, "attention": 0.1, "xla": 0.2,
         "sampling": 0.05, "dispatch": 0.1}
    )  # fmt: skip
    assert sum(parts.values()) == pytest.approx(1.0)


def test_names_of_spans():
    events = np.array([[1, 9, 0, 0, 3], [2, 5, 1, 0, 2], [3, 4, 2, 1, 0], [0, 9, 3, 3, 0]])
    spans = spans_of("caller 7", events)
    assert [(s.track, s.name) for s in spans] == [
        ("caller 7", "experts"), ("caller 7", "experts unit"), ("caller 7", "linear wait"),
        ("programs", "program"),
    ]  # fmt: skip
    assert spans[0].detail == {"layer": 3} and spans[1].detail == {"phase": 2}


def test_a_trace_is_cut_not_the_memory_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "MOST_EVENTS", 1)
    with CpuRuntime(num_threads=1) as runtime:
        kept = StepProfile(runtime, tmp_path / "t.json")
        for _ in range(3):
            kept.begin()
            measure.empty_job(runtime, calls=2, repeats=1)
            kept.end("decode", tokens=1, compiled=False)
        assert kept.describe().startswith("decode: 3 steps")  # the seconds go on
        kept.close()
        kept.close()
    told = json.loads((tmp_path / "t.json").read_text())
    assert "nothing is kept" in told["otherData"]["cut"]
    assert [e["name"] for e in told["traceEvents"] if e["ph"] == "X"].count("decode") == 1


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'got \'trace.txt\', wanted "seconds" or the name of a'):
        EngineConfig(profile="trace.txt")
    assert EngineConfig(profile="seconds").trace_path is None
    with CpuRuntime(num_threads=1) as runtime, pytest.raises(ConfigError, match="no directory"):
        StepProfile(runtime, tmp_path / "no" / "t.json")
