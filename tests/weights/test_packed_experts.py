"""Experts that a checkpoint packs into one tensor a layer: transposed and interleaved (gpt-oss), or
as they are used (Qwen3.5).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import tiny_models
from support.checkpoints import assert_same_model, edit_tensors, load_case

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.weights.convert import convert
from jaxmoe.weights.host_store import Backing
from jaxmoe.weights.random_checkpoint import stored_tensors
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.tensor_table import MATRICES

GATE_UP = "model.layers.{}.mlp.experts.gate_up_proj"
DOWN = "model.layers.{}.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    tiny_models.write_checkpoint(path, "gpt_oss")
    return path


@pytest.mark.parametrize("numa_nodes", [None, [[0], [0]]])
def test_each_matrix_is_cut_out(directory: Path, numa_nodes: list[list[int]] | None) -> None:
    tensors = tiny_models.make_tensors("gpt_oss")
    with CpuRuntime(numa_nodes=numa_nodes) as runtime:
        config, model = load_case(directory, runtime)
        store = model.host_store
        assert store is not None
        for layer in config.moe_layers:
            for expert in (0, 7, 23):
                gate_up = tensors[GATE_UP.format(layer)][expert]
                wanted = {
                    "gate": gate_up[:, 0::2].T,
                    "up": gate_up[:, 1::2].T,
                    "down": tensors[DOWN.format(layer)][expert].T,
                }
                for which in MATRICES:
                    rows = [part for _, part in store.writable_rows(layer, expert, which)]
                    assert np.concatenate(rows).tobytes() == wanted[which].tobytes()
        model.close()


def test_mapped_files_are_refused(directory: Path, runtime: CpuRuntime) -> None:
    with pytest.raises(CheckpointError, match="gate_up_proj.*backing=arena"):
        load_case(directory, runtime, backing="mmap")


def test_a_prepared_checkpoint_holds_them_as_they_are_used(
    tmp_path: Path, directory: Path, runtime: CpuRuntime
) -> None:
    with Checkpoint.open(directory) as source:
        config = ModelConfig.from_hf(source.config())
        convert(source, config, registry, tmp_path / "prepared", piece_bytes=1 << 20)
    prepared = load_case(tmp_path / "prepared", runtime)[1]
    assert_same_model(prepared, load_case(directory, runtime)[1])


def test_wrong_shapes_are_named(tmp_path: Path, runtime: CpuRuntime) -> None:
    name = GATE_UP.format(1)
    edit_tensors(tmp_path, "gpt_oss", lambda t: t.update({name: t[name][:, :, :-2].copy()}))
    with pytest.raises(CheckpointError, match="gate_up_proj.*shape.*256, 318.*wanted.*256, 320"):
        load_case(tmp_path, runtime)


def test_fp8_is_refused() -> None:
    hf = tiny_models.hf_config("gpt_oss")
    hf["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = ModelConfig.from_hf(hf)
    with pytest.raises(CheckpointError, match="packs fp8_block experts"):
        list(stored_tensors(config, registry))


@pytest.fixture(scope="module")
def rows_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    tiny_models.write_checkpoint(path, "qwen3_5_moe")
    return path


@pytest.mark.parametrize("backing", ["arena", "mmap"])
def test_rows_of_a_packed_tensor_are_read_where_they_lie(
    rows_directory: Path, runtime: CpuRuntime, backing: Backing
) -> None:
    tensors = tiny_models.make_tensors("qwen3_5_moe")
    config, model = load_case(rows_directory, runtime, backing=backing)
    arena = load_case(rows_directory, runtime)[1]
    assert model.host_store is not None and arena.host_store is not None
    for layer in config.moe_layers if backing == "arena" else ():
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        gate_up, down = tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"]
        for expert in (0, 7, 23):
            wanted = {"gate": gate_up[expert, :160], "up": gate_up[expert, 160:]}
            wanted["down"] = down[expert]
            for which in MATRICES:
                rows = [part for _, part in model.host_store.writable_rows(layer, expert, which)]
                assert np.concatenate(rows).tobytes() == wanted[which].tobytes()
    expert_bytes = sum(array.nbytes for name, array in tensors.items() if ".mlp.experts." in name)
    assert (
        arena.report.read_bytes
        - load_case(rows_directory, runtime, backing="mmap")[1].report.read_bytes
        == expert_bytes
    )


def test_packed_rows_survive_conversion(
    tmp_path: Path, rows_directory: Path, runtime: CpuRuntime
) -> None:
    with Checkpoint.open(rows_directory) as source:
        config = ModelConfig.from_hf(source.config())
        convert(source, config, registry, tmp_path / "prepared", piece_bytes=1 << 20)
    prepared = load_case(tmp_path / "prepared", runtime)[1]
    assert_same_model(prepared, load_case(rows_directory, runtime)[1])
