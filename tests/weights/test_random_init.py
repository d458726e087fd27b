"""Random weights: right formats, finite activations, and the same however they are made."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny_models
from support.checkpoints import store_bytes

from jaxmoe.common.errors import CapacityError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.formats import FORMATS
from jaxmoe.weights import memory
from jaxmoe.weights.random_init import random_model
from jaxmoe.weights.random_values import RandomValues

CASES = [
    *("deepseek_v2_lite", "deepseek_v3_fp8", "qwen3_moe", "qwen3_moe_fp8"),
    *("glm4_moe_fp8", "kimi_k2_int4", "gpt_oss_mxfp4", "minimax_m2_mxfp8"),
]
# As the layers' o is held.
ATTENTION = {"kimi_k2_int4": "bf16", "gpt_oss_mxfp4": "bf16"}


def config_of(case: str) -> ModelConfig:
    return ModelConfig.from_hf(tiny_models.hf_config(case))


@pytest.mark.parametrize("case", CASES)
def test_formats_follow_the_configuration(case: str, runtime: CpuRuntime) -> None:
    config = config_of(case)
    model = random_model(config, registry, runtime)
    wanted = tiny_models.FORMATS.get(case, "bf16")
    store = model.host_store
    assert store is not None and {layout.format for layout in store.layouts} == {wanted}
    held = FORMATS[ATTENTION.get(case, wanted)]
    assert model.specs["layers.1.attention.o.data"].dtype == held.data_dtype
    assert model.report.read_bytes == 0 and "random" in model.report.describe()
    model.close()


@pytest.mark.parametrize(
    "case", ["deepseek_v3_fp8", "qwen3_moe", *(c for c in CASES[4:]), "qwen3_moe_int4"]
)
def test_linear_maps_about_keep_the_variance(case: str, runtime: CpuRuntime) -> None:
    config = config_of(case)
    model = random_model(config, registry, runtime)
    store = model.host_store
    assert store is not None
    for which in ("gate", "down"):
        k = store.layouts[0].shape(which)[1]
        data = np.concatenate([rows for _, rows in store.writable_rows(0, 3, which)])
        has_scale = store.layouts[0].scale_shape(which) is not None
        scale = store.scale(0, 3, which) if has_scale else None
        w = dequantize(store.layouts[0].format, data, scale)
        assert np.isfinite(w).all()
        assert 0.7 < w.std() * k**0.5 < 1.4
    model.close()


def test_seed_and_nothing_else_decides(runtime: CpuRuntime) -> None:
    config = config_of("qwen3_moe_fp8")
    made = []
    for seed, threads in ((1, 1), (1, 2), (2, 2)):
        model = random_model(config, registry, runtime, seed=seed, num_threads=threads)
        made.append((store_bytes(model), [np.asarray(x).tobytes() for x in model.leaves]))
        model.close()
    assert made[0] == made[1]
    assert made[0][0] != made[2][0] and made[0][1] != made[2][1]


def test_experts_differ(runtime: CpuRuntime) -> None:
    model = random_model(config_of("qwen3_moe"), registry, runtime)
    store = model.host_store
    assert store is not None
    some = {store.matrix(0, expert, "gate").tobytes() for expert in range(4)}
    rows = {row.tobytes() for row in store.matrix(0, 0, "gate")}
    assert len(some) == 4 and len(rows) == store.layouts[0].intermediate
    model.close()


def test_a_part_has_the_values_of_the_whole() -> None:
    """A matrix split over NUMA nodes is the same matrix."""
    values = RandomValues(3)
    whole, part = np.empty((9, 1_000_003), np.float32), np.empty((4, 1_000_003), np.float32)
    values.fill_weights(whole, "a", 64)
    values.fill_weights(part, "a", 64, first=5 * 1_000_003)
    np.testing.assert_array_equal(whole[5:], part)


def test_refused_when_memory_is_short(runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000)
    with pytest.raises(CapacityError, match=r"random weights of Qwen3Moe.*\(1000 bytes\)"):
        random_model(config_of("qwen3_moe"), registry, runtime)
