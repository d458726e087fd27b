"""What the docs say of flags and fields is what the code says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "update_docs.py"


def test_the_docs_are_up_to_date():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_come_from_the_runs(monkeypatch):
    spec = importlib.util.spec_from_file_location("update_docs", TOOL)
    update_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_docs)
    figure = {
        "name": "decode x batch=1", "threads": 2, "median_seconds": 0.025, "tokens_per_s": 40.0,
        "read_ceiling_bytes_per_s": 50e9, "fraction_of_read_ceiling": 0.75,
        "peak_flops_per_s": 4e11, "fraction_of_peak": 0.01, "fraction_of_roofline": 0.75,
    }  # fmt: skip
    compared = {
        "name": "decode x", "threads": 2, "rival": "tiny Q8_0, build abc", "ratio": 2.0,
        "command": "/opt/llama-bench -m /m.gguf -p 0 -n 32", "tokens_per_s": [39.0, 40.0, 41.0],
        "rival_tokens_per_s": [19.0, 20.0, 30.0],
    }  # fmt: skip
    run = {
        "command": "jaxmoe_bench decode --model=x.json",
        "machines": [{"cpu": "Some CPU", "cpu_id": "V 1 2 3", "isa": "avx2", "logical_cpus": 2,
                      "load_average": 0.1}],
        "figures": [figure], "comparisons": [compared], "overheads": [],
    }  # fmt: skip
    text = update_docs.measured_tables({"a": run})
    assert "`jaxmoe_bench decode --model=x.json` on Some CPU (V 1 2 3), avx2" in text
    assert (
        "| decode x batch=1 | 2 | 25 ms | 40.0 | 50.0 GB/s | 0.75 | 400 GFLOP/s | 0.01 | 0.75 |"
        in text
    )
    assert (
        "40.0 tok/s | 20.0 tok/s | tiny Q8_0, build abc: `llama-bench -p 0 -n 32` | 2.00 |" in text
    )
