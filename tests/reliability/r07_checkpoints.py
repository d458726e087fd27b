"""R7: damaged checkpoints, each loaded whole in a child process: headers, data, scales, index,
configuration and tokenizer with something wrong, shards cut, missing or swapped, and files that
fail, end early or are cut while they are read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from reliability.figures import Check, Goal

TESTS = Path(__file__).parents[1]
_BATCH = 500
_HANG_S = 600


def measure(count: int) -> list[Goal]:
    ends: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    signals = 0
    with tempfile.TemporaryDirectory() as folder:
        faults = _faults(Path(folder))
        clean = _child(Path(folder) / "clean", "clean", 0, min(count, _BATCH), faults)
        clean_mib, most_mib = clean[-1]["peak_mib"], 0.0
        at = 0
        while at < count:
            lines = _child(Path(folder) / f"w{at}", "damage", at, min(at + _BATCH, count), faults)
            seen = [e for e in lines if "seed" in e]
            for e in seen:
                ends[e["end"]] += 1
                kinds[e["kind"]] += 1
                if e["end"] == "wrong":
                    wrong.append(f"{e['kind']} {e['seed']}: {e['words']}")
            if lines and "peak_mib" in lines[-1]:
                most_mib = max(most_mib, lines[-1]["peak_mib"])
                at += _BATCH
            else:  # it did not live to the end of its part
                signals += 1
                at += len(seen) + 1
    refused, exact = ends["refused"], ends["exact"]
    first = f" (first: {wrong[0][:200]})" if wrong else ""
    return [
        Goal("loads that ended a process", "0", str(signals), signals == 0),
        Goal(
            "bit-exact, or refused naming the file",
            "all",
            f"{exact} exact, {refused} refused, {ends['wrong']} otherwise{first}; of "
            f"{len(kinds)} kinds, {min(kinds.values(), default=0)} or more each",
            exact + refused == count and exact > 0 and refused > exact,
        ),
        Goal(
            "peak memory",
            "within 5 % of sound loads'",
            f"{100 * (most_mib / clean_mib - 1):+.1f} % ({most_mib:.0f} MiB)",
            most_mib <= 1.05 * clean_mib,
        ),
    ]


def _faults(folder: Path) -> Path:
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def _child(folder: Path, what: str, begin: int, end: int, faults: Path) -> list[dict[str, Any]]:
    """What it said, a line each load; the last one is its peak memory if it ended well."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "reliability.r07_child", folder, what, str(begin), str(end), faults],
        cwd=TESTS,
        env={**os.environ, "LD_PRELOAD": str(faults), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=_HANG_S,
    )
    lines = []
    for line in done.stdout.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # cut by its end
    return lines


CHECK = Check(
    "damaged checkpoints", {"short": 40, "ci": 5000, "release": 100_000}, "loads", measure
)
