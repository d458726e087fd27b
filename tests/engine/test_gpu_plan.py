"""What a GPU's memory would hold, for DeepSeek-V3 as published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxmoe.cli import generate
from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.gpu_plan import plan_gpu
from jaxmoe.engine.plan import make_plan
from jaxmoe.engine.start import cache_layout
from jaxmoe.models import registry
from jaxmoe.weights.tensor_table import expert_layouts

BENCH = Path(__file__).parents[2] / "configs" / "bench"


@pytest.fixture(scope="module")
def v3():
    hf = json.loads((BENCH / "deepseek_v3.json").read_text())
    assert (hf["num_hidden_layers"], hf["first_k_dense_replace"]) == (61, 3)
    model, few = ModelConfig.from_hf(hf), ModelConfig.from_hf(hf | {"num_hidden_layers": 4})
    formats = registry.configured_formats(few)
    specs = dict(registry.describe_model(few, "bfloat16", formats).specs)
    last = {path: spec for path, spec in specs.items() if path.startswith("layers.3.")}
    for i in range(4, 61):  # described one by one they take seconds
        specs |= {path.replace("layers.3.", f"layers.{i}."): spec for path, spec in last.items()}
    return model, expert_layouts(few, formats), specs


@pytest.mark.parametrize(
    "gib, fits, streams, alone",
    [
        (141, True, True, 0),
        (32, True, True, 0),
        (24, True, False, 2),  # weights and cache, and no room for a ring beside them
        (16, False, False, 2),  # prompts alone, with all weights streamed
        (2, False, False, None),
    ],
)
def test_deepseek_v3(v3, gib, fits, streams, alone):
    model, layouts, specs = v3
    config = EngineConfig(max_model_len=16384, kv_cache_gb=2.0)
    layout = cache_layout(config, model)
    plan = plan_gpu(config, model, layout, layouts, specs, gib << 30)
    assert (plan.fits, plan.slp is not None) == (fits, streams)
    assert 16e9 < plan.weight_bytes < 19.5e9  # 671e9 parameters less 654e9 of experts
    assert (None if plan.alone is None else plan.alone.weight_slots) == alone
    if plan.slp is not None:
        total = plan.weight_bytes + plan.kv_bytes + plan.slp.device_bytes
        assert total <= plan.room_bytes < plan.memory_bytes
    if plan.alone is not None and plan.alone.weight_slots:
        assert plan.alone.device_bytes < plan.room_bytes and plan.alone.weight_bytes < 2e9
    text = "\n".join(plan.describe())
    assert ("DOES NOT FIT a GPU that decodes" in text) == (not fits)
    # The way that is left is named where there is one.
    way = "use device=cpu with disaggregate=on: the CPU decodes, and the GPU computes long prompts"
    assert (way in text) == (not fits and alone is not None)
    assert ("prompts alone (disaggregate=on) would take" in text) == (alone == 2)
    assert plan.alone is None or plan.alone_bytes < plan.room_bytes
    assert ("streamed through 2 slots" in text) == (alone == 2)


@pytest.fixture
def folder(tmp_path):
    hf = json.loads((BENCH / "deepseek_v3.json").read_text())
    hf |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 1}
    hf |= {"topk_group": 1, "num_experts_per_tok": 2, "vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return tmp_path


def test_the_command_tells_it_where_there_is_no_gpu(folder, capsys):
    arguments = [f"--model={folder}", "--load_format=dummy", "--plan_only", "--max_model_len=4096"]
    assert generate.main(["jaxmoe_generate", *arguments]) == 0
    assert "GPU" not in capsys.readouterr().out
    assert generate.main(["jaxmoe_generate", *arguments, "--gpu_memory_gb=32"]) == 0
    text = capsys.readouterr().out
    for part in ("GPU        32.00 GiB", "resident", "KV cache", "ring of", "at the peak"):
        assert part in text, text
    assert generate.main(["jaxmoe_generate", *arguments, "--gpu_memory_gb=0.5"]) == 3
    assert "DOES NOT FIT a GPU that decodes: short by" in capsys.readouterr().out
    assert generate.main(["jaxmoe_generate", "--prompt=x", "--gpu_memory_gb=32"]) == 1
    assert "gpu_memory_gb: wanted --plan_only beside it" in capsys.readouterr().err


def test_what_no_gpu_kernel_can_do_is_said(folder):
    options = {"model": str(folder), "load_format": "dummy", "compute_dtype": "float32"}
    with pytest.raises(ConfigError, match="gpu_memory_gb: float32 activations"):
        make_plan(EngineConfig(**options), gpu_memory_gb=32)
