"""Tensor names: every stored tensor has its place, and MLA's split loses nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import tiny_models, tiny_quant
from support.tiny_runner import stored_formats

from jaxmoe import models
from jaxmoe.config.model_config import MlaConfig, ModelConfig
from jaxmoe.models import deepseek_names
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.formats import data_shape, scale_shape

# One of each way in which names, exceptions and tensors beside the weights come together.
IN_OTHER_WAYS = ("kimi_k25_nvfp4", "minimax_m2_nvfp4", "qwen3_5_moe_gptq", "deepseek_v3_awq")


def is_alike(case: str) -> bool:
    return case in tiny_models.COMBINED and case not in IN_OTHER_WAYS


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if is_alike(c) else []) for c in tiny_models.CASES],
)
def test_every_tensor_is_used_or_known_as_not_needed(case: str):
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    tensors = tiny_models.make_tensors(case)
    formats = stored_formats(config, tensors)
    described = models.describe_model(config, "bfloat16", formats)
    names = models.name_map(config, described.specs, formats)
    used, others = set(), set()
    for path, spec in described.specs.items():
        source = names.tensors_for(path)
        for tensor in source.tensors:
            array = tensors[tensor.name]
            assert array.shape == tensor.shape
            assert tiny_models.DTYPE_NAMES[array.dtype] in tensor.dtypes
            used.add(tensor.name)
        others.update(source.others)
        leaf = source.transform(*(tensors[name] for name in source.names))
        assert leaf.shape == spec.shape and leaf.dtype.name == spec.dtype
    for layer in config.moe_layers:
        form = names.expert_form(layer)
        for expert in range(config.moe.router.num_experts):
            for which in ("gate", "up", "down"):
                name = names.expert_tensor(layer, expert, which)
                used.add(form.weight_name(name))
                others.update(form.others(name))
                n, k = config.moe.expert_intermediate, config.hidden_size
                n, k = (k, n) if which == "down" else (n, k)
                held = scale_shape(form.format, n, k)
                packed = names.packed_experts(layer, which)
                if form.scale is not None and packed is not None:
                    used.add(form.scale_name(name))
                elif held is not None:
                    used.update(t.name for t in form.scale_tensors(name, held))
                if packed is not None:
                    assert packed.tensor == form.weight_name(name)
                    cut = packed.cut(tensors[packed.tensor][expert])
                    assert cut.shape == data_shape(form.format, n, k)
                    if packed.scale is not None:
                        cut = packed.scale.cut(tensors[packed.scale.tensor][expert])
                        assert cut.shape == scale_shape(form.format, n, k)
    assert used <= tensors.keys()
    assert not used & others
    rest = tensors.keys() - used - others
    assert all(names.ignored(name) for name in rest)
    assert not any(names.ignored(name) for name in used)
    if config.architecture == "DeepseekV3ForCausalLM" and config.model_type != "kimi_k2":
        assert f"model.layers.{config.num_layers}.eh_proj.weight" in rest


def test_strangers_are_not_ignored():
    config = ModelConfig.from_hf(tiny_models.hf_config("qwen3_moe"))
    names = models.name_map(config, {})
    for name in ("model.layers.3.self_attn.sinks", "visual.patch_embed", "lm_head.weight"):
        assert not names.ignored(name)
    assert not names.ignored("model.layers.4.input_layernorm.weight")  # 4 layers, no draft head
    v3 = ModelConfig.from_hf(tiny_models.hf_config("deepseek_v3"))  # 4 layers and one
    for layers, ignored in ((4, True), (5, False), (3, False)):
        names = models.name_map(dataclasses.replace(v3, num_layers=layers), {})
        assert names.ignored("model.layers.4.eh_proj.weight") == ignored
    tied = models.name_map(dataclasses.replace(config, tie_embeddings=True), {})
    assert tied.ignored("lm_head.weight")


def test_an_indexer_is_ignored_in_layers_that_use_anothers_choice():
    indexer = "model.layers.{}.self_attn.indexer.wq_b.weight"
    config = ModelConfig.from_hf(tiny_models.hf_config("glm_moe_dsa_shared"))
    names = models.name_map(config, {})
    assert [names.ignored(indexer.format(i)) for i in range(4)] == [False, True, False, True]
    assert names.weight_name("layers.0.attention.indexer.q") == indexer.format(0)
    v3 = models.name_map(ModelConfig.from_hf(tiny_models.hf_config("deepseek_v3")), {})
    assert not v3.ignored(indexer.format(1))


def test_parts_of_a_larger_model():
    names = models.name_map(ModelConfig.from_hf(tiny_models.hf_config("kimi_k25")), {})
    weight = "language_model.model.layers.0.self_attn.o_proj.weight"
    assert names.weight_name("layers.0.attention.o") == weight
    assert names.weight_name("lm_head") == "language_model.lm_head.weight"
    for name in ("vision_tower.patch_embed.proj.bias", "mm_projector.proj.0.weight"):
        assert names.ignored(name)
    for name in ("model.layers.0.self_attn.o_proj.weight", "audio_tower.x", weight):
        assert not names.ignored(name)


@pytest.mark.parametrize(("nope", "v"), [(128, 128), (128, 256), (192, 128), (64, 96)])
def test_kv_b_split_keeps_every_value(nope: int, v: int):
    attention = MlaConfig(3, None, 200, nope, 64, v, 1.0)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3 * (nope + v), 200)).astype(np.float32)
    data, scale = tiny_quant.fp8_block(w, tiny_models.F32)
    exact = dequantize("fp8_block", data, scale)
    whole = deepseek_names.split_kv_b(exact, attention)
    for n in range(3):
        rows = exact[n * (nope + v) : (n + 1) * (nope + v)]
        np.testing.assert_array_equal(whole["w_uk"][n], rows[:nope].T)
        np.testing.assert_array_equal(whole["w_uv"][n], rows[nope:])
    held = deepseek_names.head_map_format(attention, "fp8_block", "w_uk")
    assert held == ("fp8_block" if nope % 128 == 0 and v % 128 == 0 else "f32")
    if held == "fp8_block":
        parts = deepseek_names.split_kv_b(data, attention)
        scales = deepseek_names.split_kv_b_scale(scale, attention)
        for which, expected in whole.items():
            for n in range(3):
                got = dequantize("fp8_block", parts[which][n], scales[which][n])
                np.testing.assert_array_equal(got, expected[n])


def test_heads_across_scale_blocks_are_dequantized_with_a_warning(
    caplog: pytest.LogCaptureFixture,
):
    hf = tiny_models.hf_config("deepseek_v3_fp8") | {"qk_nope_head_dim": 192}
    config = ModelConfig.from_hf(hf)
    formats = models.configured_formats(config)
    described = models.describe_model(config, "bfloat16", formats)
    path = "layers.0.attention.w_uk.data"
    assert described.specs[path].dtype == "float32"
    assert "4 times its stored bytes" in caplog.text
    names = models.name_map(config, described.specs, formats)
    source = names.tensors_for(path)
    assert [t.name.rpartition(".")[2] for t in source.tensors] == ["weight", "weight_scale_inv"]
    w = np.random.default_rng(0).normal(size=(4 * 320, 512)).astype(np.float32)
    data, scale = tiny_quant.fp8_block(w, tiny_models.F32)
    leaf = source.transform(data, scale)
    assert leaf.shape == described.specs[path].shape
    np.testing.assert_array_equal(leaf[1], dequantize("fp8_block", data, scale)[320 : 320 + 192].T)
