"""Architectures, and how the formats of their weights are decided."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import parity_tables, tiny_models
from support.parity import load_fixture
from support.tiny_runner import stored_formats

from jaxmoe import models
from jaxmoe.common.errors import CheckpointError
from jaxmoe.config import families
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.quant.formats import FORMATS
from jaxmoe.weights.stored_form import Stored


def config_of(case: str) -> ModelConfig:
    return ModelConfig.from_hf(tiny_models.hf_config(case))


def test_what_parses_has_names():
    assert models.SUPPORTED.keys() == families.PARSERS.keys()


def test_every_case_is_held_to_its_fixture_and_every_architecture_to_a_case():
    """The README's tables (tools/update_docs.py) claim what passed, and nothing else."""
    results = parity_tables.load_results()
    assert list(results) == list(tiny_models.CASES)
    for case, entry in results.items():
        assert entry["fixture"] == load_fixture(case).digest[:16], case
        assert entry["float32_error"] <= 1e-4
        assert entry["bfloat16_kl"] <= entry["transformers_kl"]
    table = parity_tables.supported(results)
    rows = re.findall(r"^\| `(\w+For\w+)` \| .+ \| .+ \|$", table, flags=re.MULTILINE)
    assert rows == list(models.SUPPORTED)
    without = {case: entry for case, entry in results.items() if case != "minimax_m2_mxfp8"}
    assert "MXFP8" in table and "MXFP8" not in parity_tables.supported(without)


def test_the_readme_describes_every_format():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.partition("| format | values |")[2].partition("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(first))) == sorted(FORMATS)


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_configured_formats_are_those_of_real_checkpoints(case: str):
    config = config_of(case)
    tensors = tiny_models.make_tensors(case)
    stored = stored_formats(config, tensors)
    configured = models.configured_formats(config)
    held = models.describe_model(config, "bfloat16", stored).specs
    assert models.describe_model(config, "bfloat16", configured).specs == held
    quant = tiny_models.hf_config(case).get("quantization_config", {})
    whole = quant.get("modules_to_not_convert") or ()
    for layer in config.moe_layers:
        path = f"layers.{layer}.mlp.experts"
        assert stored(path) == configured(path)
        is_kept = f"model.layers.{layer}." in whole
        assert stored(path) == ("bf16" if is_kept else tiny_models.FORMATS.get(case, "bf16"))


def test_modules_kept_in_bfloat16():
    hf = tiny_models.hf_config("deepseek_v3_fp8")
    hf["quantization_config"] = hf["quantization_config"] | {
        "modules_to_not_convert": ["model.layers.0.self_attn", "o_proj"]
    }
    formats = models.configured_formats(ModelConfig.from_hf(hf))
    assert formats("layers.0.attention.q_a") == "bf16"
    assert formats("layers.1.attention.q_a") == "fp8_block"
    assert formats("layers.1.attention.o") == "bf16"
    assert formats("layers.1.mlp.router.logits") == "bf16"


def test_a_router_may_be_float32_of_its_own():
    config = config_of("minimax_m2_fp8")
    assert models.configured_formats(config)("layers.1.mlp.router.logits") == "f32"
    assert models.configured_formats(config)("layers.1.mlp.experts") == "fp8_block"
    assert config.quant.not_converted[0] == "gate"


Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("case", "dtypes", "mentions"),
    [
        ("deepseek_v3", {}, ["missing", Q_A]),
        ("deepseek_v3", {Q_A: "F16"}, [Q_A, "F16", "BF16, F32, F8_E4M3"]),
        ("deepseek_v3", {Q_A: "F8_E4M3"}, [Q_A, "quantization_config"]),
    ],
)
def test_unusable_storage_is_refused(case: str, dtypes: dict[str, str], mentions: list[str]):
    tensors = {name: Stored(dtype, (192, 256)) for name, dtype in dtypes.items()}
    formats = models.stored_formats(config_of(case), tensors)
    with pytest.raises(CheckpointError) as error:
        formats("layers.0.attention.q_a")
    for words in mentions:
        assert words in str(error.value)


def test_fp8_embedding_is_refused():
    name = "model.embed_tokens.weight"
    formats = models.stored_formats(
        config_of("deepseek_v3_fp8"), {name: Stored("F8_E4M3", (512, 256))}
    )
    with pytest.raises(CheckpointError, match=name):
        formats("embedding")
