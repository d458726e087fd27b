"""Invented checkpoints have exactly the tensors that shipped ones have."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models import registry
from jaxmoe.weights.loader import plan_load
from jaxmoe.weights.random_checkpoint import stored_tensors, write_random_checkpoint
from jaxmoe.weights.safetensors_reader import Checkpoint

# GPTQ's order of inputs where it is the usual one, NVFP4's scales of activations.
MAY_BE_ABSENT = (".g_idx", ".input_scale", ".input_global_scale")


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_same_tensors_as_shipped(case: str) -> None:
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    shipped = tiny_models.make_tensors(case)
    ignored = registry.name_map(config, {}).ignored
    invented = {t.name: (t.shape, t.dtype) for t in stored_tensors(config, registry)}
    wanted = {
        name: (value.shape, tiny_models.DTYPE_NAMES[value.dtype])
        for name, value in shipped.items()
        if not ignored(name) and not name.endswith(MAY_BE_ABSENT)
    }
    assert invented.keys() == wanted.keys()
    for name, (shape, dtype) in wanted.items():
        other_scales = case.startswith("qwen3") and case.endswith("_fp8")
        if (other_scales or case == "deepseek_v31_fp8") and name.endswith("scale_inv"):
            dtype = "F32"  # these ship BF16 and e8m0 scales; all are accepted
        if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight")):
            dtype = "BF16"  # Qwen3.5 ships them in float32, likewise
        assert invented[name] == (shape, dtype), name


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe"])
def test_shards_are_bounded_and_streamed(tmp_path: Path, case: str) -> None:
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    write_random_checkpoint(tmp_path / "warm", config, registry)
    tracemalloc.start()
    try:
        total = write_random_checkpoint(tmp_path / "b", config, registry, shard_bytes=2_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The blocks that values are copied from, and one tensor: not the checkpoint.
    assert peak < 90_000_000
    with Checkpoint.open(tmp_path / "b") as checkpoint:
        assert checkpoint.total_bytes == total and len(checkpoint.files) > 4
        assert max(file.stat().st_size for file in checkpoint.files) < 2_100_000
        plan_load(checkpoint, config, registry, "bfloat16", 1)
        with Checkpoint.open(tmp_path / "warm") as single:
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(info) == single.read(single.tensors[name]), name


def test_values_are_finite(tmp_path: Path) -> None:
    config = ModelConfig.from_hf(tiny_models.hf_config("deepseek_v3_fp8"))
    write_random_checkpoint(tmp_path, config, registry)
    with Checkpoint.open(tmp_path) as checkpoint:
        for info in checkpoint.tensors.values():
            codes = np.frombuffer(checkpoint.read(info), np.uint8)
            if info.dtype == "F8_E4M3":
                assert not ((codes & 0x7F) == 0x7F).any(), info.name
            elif info.dtype == "F32":
                assert np.isfinite(codes.view(np.float32)).all(), info.name
