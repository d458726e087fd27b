"""Crossovers: chosen by measurement, kept with the CPU's identity, and of no effect on results."""

import json

import numpy as np
import pytest
from support.native import Layer, make_store

from jaxmoe.engine import calibration
from jaxmoe.engine.calibration import Calibration, calibrate, crossover, identity
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps


class Scripted:
    """Measures what it is told."""

    def __init__(self, measure, cpu_share=1.0):
        self.measure, self.cpu_share = measure, cpu_share

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def never(rows):
    raise AssertionError("measured again")


@pytest.mark.parametrize(
    ("long_runs", "want"),
    [
        ([1, 1, 1, 1], 8),
        ([1, 1, 3, 1], 2),  # what comes after the first loss is noise
        ([3, 1, 1, 1], 0),
        ([1, 2.01, 2.5, 1], 2),  # within the margin
    ],
)
def test_crossover(long_runs, want):
    times = dict(zip((1, 2, 4, 8), long_runs, strict=True))
    assert crossover((1, 2, 4, 8), lambda rows: (times[rows], 2.0)) == want


def test_the_answer_is_kept_with_the_cpus_identity(tmp_path):
    file = tmp_path / "cache" / "calibration.json"
    with CpuRuntime(num_threads=2) as runtime:
        found = calibrate(runtime, file.parent, Scripted(lambda rows: (rows, 6.0)))
        assert found.few_tokens == runtime.few_tokens == 6
        assert "up to 6 tokens an expert (measured in" in found.describe()
        assert json.loads(file.read_text()) == {identity(runtime): 6}
    with CpuRuntime(num_threads=2) as runtime:
        assert calibrate(runtime, file.parent, Scripted(never)) == Calibration(
            6, f"measured earlier, {file}"
        )
        assert runtime.few_tokens == 6
    with CpuRuntime(num_threads=1) as other, pytest.raises(AssertionError):
        calibrate(other, file.parent, Scripted(never))


@pytest.mark.parametrize("text", ["", "[1]", '{"x": "y"}', "{"])
def test_what_is_not_ours_is_measured_anew(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with CpuRuntime(num_threads=1) as runtime:
        assert calibrate(runtime, tmp_path, Scripted(lambda rows: (1.0, 2.0))).few_tokens == 24
        kept = json.loads((tmp_path / "calibration.json").read_text())
        assert kept == {identity(runtime): 24}
        kept[identity(runtime)] = 10**9  # no number we would have written
        (tmp_path / "calibration.json").write_text(json.dumps(kept))
        assert calibrate(runtime, tmp_path, Scripted(lambda rows: (3.0, 2.0))).few_tokens == 0


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with CpuRuntime(num_threads=1) as runtime:
        found = calibrate(runtime, tmp_path / "file", Scripted(lambda rows: (1.0, 2.0)))
        assert found.few_tokens == 24 and "is not kept" in caplog.text
        assert calibrate(runtime, None, Scripted(lambda rows: (3.0, 2.0))).few_tokens == 0


def test_what_a_busy_machine_says_is_not_believed(tmp_path):
    with CpuRuntime(num_threads=1) as runtime:
        default = runtime.few_tokens
        found = calibrate(runtime, tmp_path, Scripted(lambda rows: (1.0, 2.0), cpu_share=0.6))
        assert found.few_tokens == runtime.few_tokens == default
        assert "other processes had 40% of the CPUs' time" in found.source
        assert not list(tmp_path.iterdir())


def test_it_measures(monkeypatch):
    """On experts that are too small to say anything: that it runs and gives one of the counts."""
    monkeypatch.setattr(calibration, "_HIDDEN", 128)
    monkeypatch.setattr(calibration, "_INTERMEDIATE", 128)
    monkeypatch.setattr(calibration, "_LEAST_SHARE", 0.0)
    with CpuRuntime(num_threads=2) as runtime:
        found = calibrate(runtime, None)
        assert found.few_tokens in (0, *calibration.ROWS) and runtime.few_tokens == found.few_tokens


@pytest.mark.parametrize("weight_format", ["bf16", "fp8_block"])
def test_results_do_not_depend_on_it(weight_format):
    rng = np.random.default_rng(0)
    layer = Layer.random(rng, weight_format, 6, 200, 136)
    x = rng.standard_normal((9, 136)).astype(np.float32)
    ids = rng.integers(0, 6, (9, 3)).astype(np.int32)
    weights = rng.uniform(0.1, 1.0, (9, 3)).astype(np.float32)
    with CpuRuntime(num_threads=2) as runtime, make_store(runtime, layer) as store:
        found = []
        for few in (0, 4, 100):
            runtime.set_few_tokens(few)
            for family in ("vector", "matrix"):
                y = NativeOps(runtime, store, family).experts(x, ids, weights, 0)
                found.append(np.asarray(y).tobytes())
        assert found[0::2] == [found[0]] * 3 and found[1::2] == [found[1]] * 3
