"""Prompts that several devices compute together; with two of them: tests/prefill/test_dslp.py."""

from __future__ import annotations

import pytest
from support import tiny_models

from jaxmoe import LLM
from jaxmoe.common.errors import ConfigError


def test_a_second_device_that_is_not_there_is_asked_for(tmp_path):
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    with pytest.raises(ConfigError, match="sees one device.*JAX_NUM_CPU_DEVICES=2"):
        LLM(str(tmp_path), device="cpu", prefill="dslp", show_progress=False)
