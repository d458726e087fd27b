"""Prompts that several devices compute together: with two of them in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_models
from support.two_devices import run_file

from jaxmoe import LLM
from jaxmoe.common.errors import ConfigError

CASES = Path(__file__).with_name("two_devices_dslp.py")


def test_on_two_devices():
    run_file(CASES)


@pytest.mark.slow
def test_more_on_two_devices():
    run_file(CASES, "-m", "slow")


def test_a_second_device_that_is_not_there_is_asked_for(tmp_path):
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match="sees one device.*JAX_NUM_CPU_DEVICES=2"):
        LLM(str(tmp_path), device="cpu", prefill="dslp", show_progress=False)
