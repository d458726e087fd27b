"""R10: the native code under sanitizers: all its tests under three of them, and libFuzzer at its
borders (clang with address and undefined-behaviour checks).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from reliability.figures import Check, Goal

ROOT = Path(__file__).parents[2]
SANITIZERS = ("address", "undefined", "thread")
_FOLDERS = {"address": "cxx_asan", "undefined": "cxx_ubsan", "thread": "cxx_tsan"}  # tools/test's
_JOBS = "2"


def measure(seconds: int) -> list[Goal]:
    goals = [_tests(s) for s in SANITIZERS] if seconds >= 60 else []
    return [*goals, *_fuzzed(seconds)]


def _run(argv: Sequence[str | Path], timeout_s: float | None = None):
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def _build(folder: str, options: Sequence[str]) -> str:
    """What went wrong; empty for nothing."""
    made = _run(
        ["cmake", "-S", "xla_ffi", "-B", f"build/{folder}", "-G", "Ninja", "-DJAXMOE_TESTS=ON"]
        + list(options)
    )
    if made.returncode == 0:
        made = _run(["cmake", "--build", f"build/{folder}", "--parallel", _JOBS])
    return "" if made.returncode == 0 else (made.stdout + made.stderr)[-300:]


def _tests(sanitizer: str) -> Goal:
    what, folder = f"all C++ tests, {sanitizer} sanitizer", _FOLDERS[sanitizer]
    if words := _build(folder, [f"-DJAXMOE_SANITIZE={sanitizer}"]):
        return Goal(what, "0 reports", f"does not build: {words}", False)
    # Undefined behaviour is only told of by default.
    done = subprocess.run(
        ["ctest", "--test-dir", f"build/{folder}", "--output-on-failure"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    )
    # CMake 4.4 leaves out how many failed where none did.
    found = re.search(r"tests passed(?:, (\d+) tests? failed)? out of (\d+)", done.stdout)
    if found is None:
        return Goal(what, "0 reports", f"no tests ran: {done.stdout[-200:]}", False)
    failed, total = int(found.group(1) or 0), int(found.group(2))
    failed = failed or int(done.returncode != 0)
    return Goal(what, "0 reports", f"{failed} of {total} tests failed", failed == 0 and total > 5)


def _fuzzed(seconds: int) -> list[Goal]:
    clang = next((c for c in ("clang++", "clang++-14") if shutil.which(c)), None)
    if clang is None:
        return [
            Goal("libFuzzer's targets", "no finding", "there is no clang++ on this machine", None)
        ]
    words = _build(
        "cxx_fuzz",
        [
            f"-DCMAKE_CXX_COMPILER={clang}",
            "-DJAXMOE_FUZZ=ON",
            "-DJAXMOE_SANITIZE=address,undefined",
        ],
    )
    if words:
        return [Goal("libFuzzer's targets", "no finding", f"do not build: {words}", False)]
    goals = []
    for source in sorted((ROOT / "tests/xla_ffi/fuzz").glob("*_fuzz.cc")):
        program = ROOT / "build/cxx_fuzz/tests" / source.stem
        done = _run(
            [
                program,
                f"-max_total_time={seconds}",
                "-max_len=600",
                "-timeout=20",
                "-print_final_stats=1",
            ],
            timeout_s=seconds + 300,
        )
        found = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        runs = int(found.group(1)) if found else 0
        got = f"none in {runs:,} runs of {seconds} s"
        if done.returncode:
            got = " ".join(done.stderr[-400:].split())
        goals.append(
            Goal(f"libFuzzer, {source.stem}", "no finding", got, not done.returncode and runs > 100)
        )
    return goals


CHECK = Check("native code", {"short": 3, "ci": 120, "release": 86_400}, "s each target", measure)
