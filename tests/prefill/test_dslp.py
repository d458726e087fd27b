"""DSLP, in a process with two CPU devices."""

from __future__ import annotations

from pathlib import Path

from support.two_devices import run_file

CASES = Path(__file__).with_name("two_devices_dslp.py")


def test_on_two_devices():
    run_file(CASES)
