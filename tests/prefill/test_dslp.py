"""DSLP and its parts, in a process with two CPU devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.two_devices import run_files

TESTS = Path(__file__).parents[1]
FILES = [
    TESTS / "moe" / "two_devices_small_ep.py",
    TESTS / "prefill" / "two_devices_dslp.py",
    TESTS / "engine" / "two_devices_dslp.py",
]


def test_on_two_devices():
    run_files(FILES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_more_on_two_devices():
    run_files(FILES, "-m", "slow", timeout_s=3500)
