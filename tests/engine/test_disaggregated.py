"""A prefill worker beside decode, for real, on two CPU devices: every greedy answer has the tokens
that the ordinary engine gives it alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_models

from jaxmoe import LLM
from jaxmoe.common.errors import ConfigError

CHILD = Path(__file__).parents[1] / "support" / "disaggregated_child.py"


def compare(case, folder, schedules, weights, disaggregate="on"):
    tiny_models.write_checkpoint(folder, case)
    command = [sys.executable, str(CHILD), str(folder), str(schedules), weights, disaggregate]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-4000:]
    all_found = json.loads(done.stdout)
    assert "decodes; their pages" not in all_found["report_off"]
    where = (
        "on cpu:1" if disaggregate == "on" else r"by process \d+ on the same copy of the experts"
    )
    for how, found in all_found["workers"].items():
        pairs = zip(all_found["alone"], found["mixed"], strict=True)
        for seed, (alone, mixed) in enumerate(pairs):
            assert mixed == alone, (how, seed)
        assert found["streamed"] >= 3 * schedules
        # Some were dropped on the way, but none came without its layers.
        assert found["handed_over"] >= found["streamed"] * found["num_layers"]
        assert re.search(f"are computed {where} while cpu:0 decodes", found["report_on"])
        is_streamed = "other weights streamed through 2 slots" in found["report_on"]
        assert is_streamed == (how == "streamed")
        assert ("other weights resident" in found["report_on"]) != is_streamed
        if disaggregate == "process":
            # Decode went on, and the next process computes the prompt.
            assert found["killed"] == {"tokens": all_found["fresh"], "streamed": 1}
    assert list(all_found["workers"]) == weights.split(",")
    return sum(found["preemptions"] for found in all_found["workers"].values())


def test_tokens_are_those_of_the_ordinary_engine(tmp_path):
    compare("qwen3_moe", tmp_path, 1, "auto,streamed")


def test_a_process_of_its_own_hands_its_pages_over_and_may_be_killed(tmp_path):
    compare("qwen3_moe", tmp_path, 1, "auto", "process")


@pytest.mark.slow
def test_tokens_in_a_hundred_schedules_of_two_processes(tmp_path):
    assert compare("deepseek_v3_fp8", tmp_path, 100, "resident", "process") > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, weights", [("deepseek_v3_fp8", "streamed"), ("qwen3_moe", "resident")]
)
def test_tokens_in_a_hundred_schedules(case, weights, tmp_path):
    assert compare(case, tmp_path, 100, weights) > 20


@pytest.mark.parametrize(
    "options, words",
    [
        ({"disaggregate": "on"}, "only device; set JAX_NUM_CPU_DEVICES=2"),
        ({"disaggregate": "on", "prefill": "chunked"}, "use prefill=auto or slp"),
        ({"disaggregate": "maybe"}, "disaggregate"),
        ({"disaggregate": "process"}, "use shared_weights=true"),
        ({"disaggregate": "process", "shared_weights": False}, "with shared_weights=false"),
        ({"disaggregate": "process", "backing": "mmap"}, "with backing=mmap"),
        ({"disaggregate": "process", "prefill": "chunked"}, "use prefill=auto or slp"),
        ({"prefill_weights": "streamed"}, "prefill_weights: got 'streamed'.* use disaggregate=on"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        LLM(device="cpu", show_progress=False, **options)
