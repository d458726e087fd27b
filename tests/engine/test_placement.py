"""Which models a GPU's kernels can run, and what is said of those they cannot."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from support import tiny_models

from jaxmoe.common.errors import CapacityError, ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine import placement
from jaxmoe.engine.placement import check_prefill_device, choose_prefill_device, unsupported
from jaxmoe.weights.param_spec import ParamSpec

UNSUPPORTED = [
    ("deepseek_v32_fp8", {}, ["beyond index_topk = 80", "max_model_len=80"]),
    ("glm_moe_dsa_sparse", {"max_model_len": 25}, ["index_topk = 24"]),
    ("qwen3_next", {}, ["recurrent layers"]),
    ("deepseek_v4", {}, ["DeepseekV4ForCausalLM", "attention has no GPU kernel"]),
    ("deepseek_v3_fp8", {"compute_dtype": "float32"}, ["float32 activations"]),
]
SUPPORTED = [
    ("deepseek_v3_fp8", {}),
    ("qwen3_moe", {}),
    ("deepseek_v32_fp8", {"max_model_len": 80}),
]


@pytest.mark.parametrize(("case", "options", "words"), UNSUPPORTED)
def test_what_has_no_kernel_is_named(case: str, options: dict[str, Any], words: list[str]):
    model = ModelConfig.from_hf(tiny_models.hf_config(case))
    problem = unsupported(model, EngineConfig(**options))
    assert problem is not None and all(word in problem for word in words)


@pytest.mark.parametrize(("case", "options"), SUPPORTED)
def test_what_has_one_is_let_in(case: str, options: dict[str, Any]):
    model = ModelConfig.from_hf(tiny_models.hf_config(case))
    assert unsupported(model, EngineConfig(**options)) is None


class Gpu:
    """What placement asks of a device that is not here."""

    platform, device_kind, id = "cuda", "a card of 16 GB", 0

    def memory_stats(self):
        return {"bytes_limit": 14 << 30, "bytes_in_use": 0}


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    one, cpus = Gpu(), jax.local_devices(backend="cpu")[:1]
    monkeypatch.setattr(
        placement.jax, "local_devices", lambda backend: [one] if backend == "cuda" else cpus
    )
    return one


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_beside_a_cpu_that_decodes_a_gpu_computes_prompts(gpu, device):
    """device: "auto" has come to the CPU by itself, which is then said of the GPU's way too."""
    cpu = placement.jax.local_devices(backend="cpu")[0]
    model = ModelConfig.from_hf(tiny_models.hf_config("deepseek_v3_fp8"))
    on = {"device": device, "disaggregate": "on"}
    assert choose_prefill_device(EngineConfig(**on), model, cpu) == (gpu, ())
    for off in ("off", "auto"):
        config = EngineConfig(device=device, disaggregate=off)
        assert choose_prefill_device(config, model, cpu) == (None, ())
    with pytest.raises(ConfigError, match="disaggregate: on, but float32 activations"):
        choose_prefill_device(EngineConfig(**on, compute_dtype="float32"), model, cpu)
    specs = {"layers.0.attention.q_a.data": ParamSpec((4, 4), "uint8", "matrix")}
    with pytest.raises(ConfigError, match="disaggregate: on, but layers.0.*without a GPU kernel"):
        check_prefill_device(gpu, specs)
    check_prefill_device(cpu, specs)
    check_prefill_device(None, specs)


def test_weights_that_a_decoding_gpu_has_no_room_for_are_told_another_way(gpu):
    class Leaf:
        nbytes = 17 << 30

    class Loaded:
        leaves = (Leaf(),)

    with pytest.raises(
        CapacityError, match=r"take 17.00 GiB.*16 GB has 14.00 GiB free.*cpu with disaggregate=on"
    ):
        placement.to_device(Loaded(), gpu)
