"""jaxmoe_convert --expert_dtype: experts rounded to INT4, and never without saying so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models, tiny_quant
from support.checkpoints import assert_same_leaves, load_case, store_bytes

from jaxmoe.cli.convert import main
from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.plan import weight_sizes
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.weights import convert as convert_module
from jaxmoe.weights.convert import ConvertReport, convert
from jaxmoe.weights.format_summary import format_summary
from jaxmoe.weights.orbax_store import PieceWriter
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.tensor_table import MATRICES


def run(source: Path, output: Path, **options: Any) -> ConvertReport:
    with Checkpoint.open(source) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config())
        options = {"expert_format": "int4_g32", "piece_bytes": 1_000_000} | options
        return convert(checkpoint, config, registry, output, **options)


@pytest.mark.parametrize(
    ("case", "target", "source"),
    [
        ("qwen3_moe", "int4_g32", "bf16"),
        ("deepseek_v3_fp8", "int4_g32", "fp8_block"),
        ("gpt_oss", "int4_g32", "bf16"),
    ],
)
def test_experts_are_rounded_and_nothing_else(
    tmp_path: Path, case: str, target: str, source: str, runtime: CpuRuntime
) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", case)
    report = run(tmp_path / "a", tmp_path / "b", expert_format=target)
    said = re.search(
        rf"experts rounded from {source} to {target}: root mean square error ([\d.]+)% .* "
        r"([\d.]+)% in the worst matrix",
        report.describe(),
    )
    assert said
    config, exact = load_case(tmp_path / "a", runtime)
    _, rounded = load_case(tmp_path / "b", runtime)
    assert_same_leaves(exact, rounded)
    assert rounded.report.notes == (report.rounding,)
    stores = exact.host_store, rounded.host_store
    assert stores[0] is not None and stores[1] is not None
    assert {layout.format for layout in stores[1].layouts} == {target}
    elsewhere = "fp8_block" if source == "fp8_block" else "bf16"
    summary = format_summary(rounded.specs, stores[1].layouts)
    assert summary == f"{target} experts, {elsewhere} elsewhere"
    error = total = worst = 0.0
    for layer in range(len(config.moe_layers)):
        for expert in range(config.moe.router.num_experts):
            for which in MATRICES:
                values = []
                for store in stores:
                    layout = store.layouts[layer]
                    data = np.concatenate(
                        [part for _, part in store.writable_rows(layer, expert, which)]
                    )
                    has_scale = layout.scale_shape(which) is not None
                    scale = store.scale(layer, expert, which) if has_scale else None
                    values.append(dequantize(layout.format, data, scale).astype(np.float64))
                off, whole = np.square(values[0] - values[1]).sum(), np.square(values[0]).sum()
                error, total = error + off, total + whole
                worst = max(worst, off / whole)
    assert float(said[1]) == pytest.approx(100 * (error / total) ** 0.5, abs=0.006)
    assert float(said[2]) == pytest.approx(100 * worst**0.5, abs=0.006)
    assert 6 < float(said[1]) <= float(said[2]) < 12
    exact.close()
    rounded.close()


def test_an_interrupted_conversion_reports_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: CpuRuntime
) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    whole = run(tmp_path / "a", tmp_path / "b")
    saved = 0
    save = PieceWriter.save

    def dying(self: PieceWriter, folder: Path, arrays: Any) -> None:
        nonlocal saved
        saved += 1
        if saved > whole.pieces // 2:
            raise KeyboardInterrupt
        save(self, folder, arrays)

    monkeypatch.setattr(convert_module.PieceWriter, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", tmp_path / "c")
    monkeypatch.undo()
    rest = run(tmp_path / "a", tmp_path / "c")
    assert rest.kept_pieces == whole.pieces // 2 and rest.rounding == whole.rounding
    assert {p.name for p in (tmp_path / "c").iterdir()} == {
        p.name for p in (tmp_path / "b").iterdir()
    }
    models = [load_case(tmp_path / name, runtime)[1] for name in "bc"]
    assert store_bytes(models[0]) == store_bytes(models[1])
    for model in models:
        model.close()


def test_the_plan_and_the_report_say_it(tmp_path: Path) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    report = run(tmp_path / "a", tmp_path / "b")
    from types import SimpleNamespace

    directory = SimpleNamespace(
        path=tmp_path / "b",
        model_config=ModelConfig.from_hf(tiny_models.hf_config("qwen3_moe")),
    )
    sizes = weight_sizes(EngineConfig(model=str(tmp_path / "b")), directory)
    assert sizes.formats == "int4_g32 experts, bf16 elsewhere"
    assert sizes.notes == (report.rounding,)
    config = tiny_models.hf_config("qwen3_moe")
    weights = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    count = config["num_experts"] * config["num_hidden_layers"]
    assert sizes.experts == count * (weights // 2 + weights // 32 * 2)


@pytest.mark.parametrize(
    ("case", "target", "message"),
    [
        ("qwen3_moe", "int4_g128", "down of the routed experts: int4_g128 wants.*128.*160"),
        ("kimi_k2_int4", "int4_g32", "the experts are int4_g32 already"),
        ("gpt_oss_mxfp4", "int4_g32", "the experts are mxfp4 already"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    tmp_path: Path, case: str, target: str, message: str
) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", case)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "a", tmp_path / "b", expert_format=target)
    assert not (tmp_path / "b").exists()


def test_an_expert_that_is_no_number_is_named(tmp_path: Path) -> None:
    from support.checkpoints import edit_tensors

    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    poisoned = tiny_models.make_tensors("qwen3_moe")[name].copy()
    poisoned[3, 4] = np.nan
    edit_tensors(tmp_path / "a", "qwen3_moe", lambda t: t.update({name: poisoned}))
    with pytest.raises(Exception, match=f"{name}.*NaN or infinite"):
        run(tmp_path / "a", tmp_path / "b")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    places = [f"--model={tmp_path / 'a'}", f"--output={tmp_path / 'b'}"]
    assert main(["x", *places, "--expert_dtype=int3"]) == 1
    assert "expert_dtype" in capsys.readouterr().err
    assert main(["x", *places, "--expert_dtype=int4_g128"]) == 1
    assert "128" in capsys.readouterr().err
    assert main(["x", *places, "--expert_dtype=int4"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "rounded from bf16 to int4_g32" in out
    manifest = json.loads((tmp_path / "b" / "jaxmoe_prepared.json").read_text())
    assert manifest["rounding"] in out


def test_rounded_weights_are_near_the_exact_ones() -> None:
    """The reader of what is written is not the writer: tiny_quant's values of the same bytes."""
    from jaxmoe.quant.int4 import quantize_int4

    w = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    made = quantize_int4(w, "int4_g32")
    stored = {
        "a.weight_packed": made.data.view(np.int32),
        "a.weight_scale": made.scale,
        "a.weight_shape": np.array(w.shape, np.int32),
    }
    read = tiny_quant.dequantize(stored)["a.weight"]
    np.testing.assert_array_equal(read, dequantize("int4_g32", made.data, made.scale))
    assert np.abs(read - w).max() < 0.3
