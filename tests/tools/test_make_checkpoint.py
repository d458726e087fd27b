"""tools/make_checkpoint.py: directories that load, and a tokenizer that says everything."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from support import tiny_models
from tokenizers import Tokenizer

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models import registry
from jaxmoe.weights.loader import plan_load
from jaxmoe.weights.safetensors_reader import Checkpoint


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("case", "format", "wanted"),
    [
        ("qwen3_moe", "fp8", "fp8_block"),
        ("deepseek_v3_fp8", "bf16", "none"),
        ("glm4_moe", "fp8_channel", "fp8_channel"),
        ("kimi_k2", "int4", "int4_g32"),
        ("gpt_oss", "mxfp4", "mxfp4"),
        ("qwen3_moe", "mxfp4", "mxfp4"),
        ("deepseek_v3_fp8", "mxfp8", "mxfp8"),
    ],
)
def test_directory_is_a_whole_checkpoint(
    tool: ModuleType,
    tmp_path: Path,
    case: str,
    format: str,
    wanted: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_models.CONFIG_DIR / f"{case}.json"
    output = tmp_path / "out"
    arguments = [f"--config={config}", f"--output={output}", f"--format={format}", "--layers=2"]
    assert tool.main(arguments) == 0
    assert "GB of random" in capsys.readouterr().out
    with Checkpoint.open(output) as checkpoint:
        assert {"tokenizer.json", "tokenizer_config.json"} < checkpoint.companions().keys()
        parsed = ModelConfig.from_hf(checkpoint.config())
        assert parsed.num_layers == 2
        assert parsed.quant.format == wanted
        plan = plan_load(checkpoint, parsed, registry, "bfloat16", 1)
        experts = {layout.format for layout in plan.table.layouts}
        assert experts == {"bf16" if wanted == "none" else wanted}
    assert tool.main(arguments) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v3"])
def test_tokenizer_round_trip(tool: ModuleType, tmp_path: Path, case: str) -> None:
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    tool.write_tokenizer(tmp_path, config)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size
    for text in ("plain text", " spaces  and\nlines", "naïve — 日本 🙂", "\x00\x7f"):
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    for token_id in range(config.vocab_size):
        said = tokenizer.decode([token_id], skip_special_tokens=True)
        is_special = token_id in (config.bos_token_id, *config.eos_token_ids)
        assert bool(said) != is_special, token_id
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer.token_to_id(described["eos_token"]) == config.eos_token_ids[0]


@pytest.mark.parametrize("preset", ["olmoe_like", "qwen3_30b_a3b_cut", "deepseek_v3_cut"])
def test_presets_parse_and_fit_a_workstation(tool: ModuleType, preset: str) -> None:
    from jaxmoe.weights.random_checkpoint import stored_tensors

    raw = json.loads((tool.PRESETS / f"{preset}.json").read_text())
    total = sum(t.nbytes for t in stored_tensors(ModelConfig.from_hf(raw), registry))
    assert 6e9 < total < 8e9


def test_errors_are_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Gpt"]}')
    out = f"--output={tmp_path / 'out'}"
    assert tool.main([f"--config={tmp_path / 'config.json'}", out]) == 1
    assert tool.main([f"--config={tmp_path / 'none.json'}", out]) == 1
    err = capsys.readouterr().err
    assert "Gpt" in err and "none.json" in err and err.count("\n") == 2
