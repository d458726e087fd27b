"""tools/bench_speculation.py: what is made of its measurements, and a whole run on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from support import tiny_models

TOOL = Path(__file__).parents[2] / "tools" / "bench_speculation.py"


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


def test_from_which_share_of_right_guesses_a_step_pays(tool):
    pays_from = tool["pays_from"]
    assert pays_from(1, 1.58) == pytest.approx(0.58)
    assert pays_from(2, 1.75) == pytest.approx(0.5)  # 1 + 0.5 + 0.25
    assert pays_from(1, 0.9) == 0
    assert pays_from(1, 2.0) == pytest.approx(1.0)
    assert pays_from(1, 2.1) is None


def test_figures_of_rounds_in_pairs(tool):
    run = tool["Run"]
    plain = [run(0.1, 100e6, 2.0, 0, 0), run(0.2, 100e6, 2.0, 0, 0), run(0.1, 100e6, 2.0, 0, 0)]
    slower = [run(0.15, 180e6, 3.0, 40, 20), run(0.28, 180e6, 3.0, 40, 20)]
    row = tool["figures"](2, 1, plain, [*slower, run(0.2, 180e6, 3.0, 40, 20)])
    assert row.added_mb == pytest.approx(40)  # of two sequences' guesses
    assert row.pays_from == pytest.approx(0.5)
    assert row.right == pytest.approx(0.5)
    assert row.gain == pytest.approx(0.0)
    assert row.gains == pytest.approx((0.0, 1.5 / 1.4 - 1, -0.25))
    assert "a guess adds 40 MB; pays from 50% right; 50% were: +0%" in tool["line"](row, plain)


@pytest.mark.slow
def test_a_run(tool, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_models.hf_config("deepseek_v31_fp8")))
    arguments = f"--config={config} --guesses 1 --rounds 1 --steps 8 --json={tmp_path}/out.json"
    monkeypatch.setattr(sys, "argv", ["bench_speculation.py", *arguments.split()])
    tool["main"]()
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert "1 sequences, 1 guesses: step" in capsys.readouterr().out
    assert row["guesses"] == 1 and row["step_ms"] > 0
    assert row["expert_mb"] > row["added_mb"] > 0
