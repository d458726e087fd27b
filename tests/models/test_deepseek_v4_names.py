"""What only DeepSeek-V4's checkpoints can get wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import saved_v4, tiny_models
from support.tiny_runner import stored_formats

from jaxmoe import models
from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import CompressedConfig, ModelConfig
from jaxmoe.weights.loader import plan_load
from jaxmoe.weights.safetensors_reader import Checkpoint

CONFIG = ModelConfig.from_hf(tiny_models.hf_config("deepseek_v4"))


def names_of(config: ModelConfig):
    tensors = tiny_models.make_tensors("deepseek_v4")
    formats = stored_formats(config, tensors)
    specs = models.describe_model(config, "bfloat16", formats).specs
    return models.name_map(config, specs, formats), formats


def test_formats_are_told_by_the_tensors():
    _, formats = names_of(CONFIG)
    assert formats("layers.2.mlp.experts") == "mxfp4"
    for path in ("attention.q_b", "attention.o_a", "mlp.shared.up", "attention.indexer.q"):
        assert formats(f"layers.1.{path}") == "fp8_block", path
    for path in ("attention.compressor.kv", "mlp.router.logits", "attention.indexer.head_weights"):
        assert formats(f"layers.1.{path}") == "bf16", path
    assert formats("layers.0.mlp_streams.fn") == formats("streams_head.fn") == "f32"
    configured = models.configured_formats(CONFIG)
    for path in ("mlp.experts", "attention.o_a", "attention.compressor.kv", "mlp_streams.fn"):
        assert configured(f"layers.1.{path}") == formats(f"layers.1.{path}"), path


def test_a_table_that_names_experts_there_are_not_is_refused():
    names, _ = names_of(CONFIG)
    source = names.tensors_for("layers.0.mlp.router.expert_table")
    table = tiny_models.make_tensors("deepseek_v4")["layers.0.ffn.gate.tid2eid"]
    np.testing.assert_array_equal(source.transform(table), table)
    for wrong in (24, -1):
        broken = table.copy()
        broken[3, 1] = wrong
        with pytest.raises(CheckpointError, match="layers.0.ffn.gate.tid2eid.*0 to 23"):
            source.transform(broken)


def test_blocks_across_two_groups_of_the_output_are_refused():
    assert isinstance(CONFIG.attention, CompressedConfig)
    attention = dataclasses.replace(CONFIG.attention, o_rank=64, o_groups=4)
    names, _ = names_of(dataclasses.replace(CONFIG, attention=attention))
    with pytest.raises(CheckpointError, match="wo_a.*groups of 64"):
        names.tensors_for("layers.0.attention.o_a.data")


def test_a_checkpoint_that_transformers_saved(tmp_path):
    """Every tensor has its place, and none is missing; the values are in tests/parity."""
    config = ModelConfig.from_hf(saved_v4.config())
    shipped = dataclasses.replace(CONFIG, quant=config.quant)
    assert config == shipped
    with Checkpoint.open(saved_v4.write(tmp_path / "saved")) as checkpoint:
        plan = plan_load(checkpoint, config, models, "bfloat16", 1)
        leaves = [info.name for leaf in plan.table.leaves for info in leaf.infos]
        experts = [matrix.weight.name for matrix in plan.table.matrices]
        assert {*leaves, *experts} == set(checkpoint.tensors)
    tensors = saved_v4.tensors()
    tensors["model.layers.0.attn.kv_norm.weight"] = tensors.pop("model.layers.0.attn.norm.weight")
    tiny_models.write_safetensors(tmp_path / "saved" / "model.safetensors", tensors)
    with Checkpoint.open(tmp_path / "saved") as checkpoint:
        with pytest.raises(CheckpointError, match="model.layers.0.attn.norm.weight"):
            plan_load(checkpoint, config, models, "bfloat16", 1)


def test_draft_heads_beyond_those_in_the_config_are_not_ignored():
    names, _ = names_of(CONFIG)
    assert names.ignored("mtp.0.norm.weight") and not names.ignored("mtp.1.norm.weight")
