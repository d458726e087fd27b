"""Tests that need two CPU devices run in a process that has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_files(paths: Sequence[Path], *more: str, timeout_s: float = 540) -> None:
    """The tests of files whose names pytest does not collect by itself. By hand:
    JAX_NUM_CPU_DEVICES=2 NPROC=4 python -m pytest FILE.
    """
    # A thread of XLA for each device and each handler that waits for weights.
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "NPROC": "4"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, paths), *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
