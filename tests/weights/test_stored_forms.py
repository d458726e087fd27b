"""Quantized checkpoints as shipped: what is held stands for exactly the values that were stored,
whatever config.json says of them; and what no format can hold is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import tiny_models, tiny_quant
from support.checkpoints import (
    assert_same_leaves,
    assert_same_model,
    edit_tensors,
    experts_output,
    leaves_of,
    load_case,
)

from jaxmoe.common.errors import CheckpointError, ConfigError
from jaxmoe.config.model_config import ModelConfig, QuantConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.models.stored_forms import find_form
from jaxmoe.quant.dequantize import dequantize
from jaxmoe.quant.formats import format_of, scale_shape
from jaxmoe.weights.convert import convert
from jaxmoe.weights.format_summary import format_summary
from jaxmoe.weights.host_store import HostStore
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import write_checkpoint
from jaxmoe.weights.stored_form import Stored
from jaxmoe.weights.tensor_table import MATRICES

CASES = {
    "glm4_moe_fp8": "fp8_channel weights",
    "kimi_k2_int4": "int4_g32 experts, bf16 elsewhere",
    "gpt_oss_mxfp4": "mxfp4 experts, bf16 elsewhere",
    "deepseek_v31_fp8": "fp8_block weights",
    "qwen3_moe_mxfp4": "mxfp4 weights",
    "qwen3_moe_int4": "int4_g128 weights",
    "minimax_m2_mxfp8": "mxfp8 weights",
    "qwen3_moe_awq": "uint4_g128 experts, bf16 elsewhere",
    "qwen3_moe_gptq": "uint4_g32 weights",
    "qwen3_moe_nvfp4": "nvfp4 weights",
    "deepseek_v3_nvfp4": "nvfp4 experts, f32 elsewhere",
    "glm4_moe_int4": "uint4_g32 experts, bf16 elsewhere",
    "minimax_m2_nvfp4": "nvfp4 experts, bf16 elsewhere",
}
Tensors = dict[str, np.ndarray]


def expert_values(store: HostStore, moe_idx: int, expert: int, which: Any) -> np.ndarray:
    layout = store.layouts[moe_idx]
    rows = [part for _, part in store.writable_rows(moe_idx, expert, which)]
    has_scale = layout.scale_shape(which) is not None
    scale = store.scale(moe_idx, expert, which) if has_scale else None
    return dequantize(layout.format, np.concatenate(rows), scale)


def stored_values(case: str, plain: Tensors, layer: int, expert: int, which: str) -> np.ndarray:
    if case == "gpt_oss_mxfp4":
        name = "down_proj" if which == "down" else "gate_up_proj"
        packed = plain[f"model.layers.{layer}.mlp.experts.{name}"][expert]
        return packed.T if which == "down" else packed[:, 0 if which == "gate" else 1 :: 2].T
    if case.startswith("minimax"):
        name = {"gate": "w1", "up": "w3", "down": "w2"}[which]
        return plain[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
    return plain[f"model.layers.{layer}.mlp.experts.{expert}.{which}_proj.weight"]


def assert_values_are_stored_ones(case: str, config: ModelConfig, model: LoadedModel) -> None:
    plain = tiny_quant.dequantize(tiny_models.make_tensors(case))
    store = model.host_store
    assert store is not None
    for moe_idx, layer in enumerate(config.moe_layers):
        for expert in (0, 5, config.moe.router.num_experts - 1):
            for which in MATRICES:
                wanted = stored_values(case, plain, layer, expert, which)
                np.testing.assert_array_equal(expert_values(store, moe_idx, expert, which), wanted)
    leaves, o = leaves_of(model), "layers.1.attention.o"
    data, scale = leaves[f"{o}.data"], leaves.get(f"{o}.scale_inv")
    found = "bf16"
    if scale is not None:
        found = format_of(data.dtype.name, data.shape, scale.dtype.name, scale.shape)
    wanted = plain["model.layers.1.self_attn.o_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(dequantize(found, data, scale), wanted)


TWO_NODES = [[0], [0]]


@pytest.mark.parametrize(
    ("case", "numa_nodes"),
    [*((case, None) for case in CASES), ("kimi_k2_int4", TWO_NODES), ("gpt_oss_mxfp4", TWO_NODES)],
)
def test_what_is_held_is_what_was_stored(
    tmp_path: Path, case: str, numa_nodes: list[list[int]] | None
) -> None:
    tiny_models.write_checkpoint(tmp_path, case)
    with CpuRuntime(
        num_threads=1 if numa_nodes is None else None, numa_nodes=numa_nodes
    ) as runtime:
        config, model = load_case(tmp_path, runtime)
        assert model.host_store is not None
        layouts = model.host_store.layouts
        assert {layout.format for layout in layouts} == {tiny_models.FORMATS[case]}
        assert format_summary(model.specs, layouts) == CASES[case]
        assert model.report.planned_bytes >= model.report.leaf_bytes + model.report.expert_bytes
        assert_values_are_stored_ones(case, config, model)
        model.close()


@pytest.mark.parametrize("case", ["glm4_moe_fp8", "kimi_k2_int4", "qwen3_moe_mxfp4"])
def test_mapped_files_hold_the_same(tmp_path: Path, case: str, runtime: CpuRuntime) -> None:
    tiny_models.write_checkpoint(tmp_path, case)
    _, arena = load_case(tmp_path, runtime)
    _, mapped = load_case(tmp_path, runtime, backing="mmap")
    assert_same_leaves(arena, mapped)
    np.testing.assert_array_equal(experts_output(arena, runtime), experts_output(mapped, runtime))
    arena.close()
    mapped.close()


@pytest.mark.parametrize("case", CASES)
def test_prepared_ones_are_the_same(tmp_path: Path, case: str, runtime: CpuRuntime) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", case)
    with Checkpoint.open(tmp_path / "a") as source:
        config = ModelConfig.from_hf(source.config())
        report = convert(source, config, registry, tmp_path / "b", piece_bytes=1 << 20)
    assert report.rounding == "" and "rounded" not in report.describe()
    _, one = load_case(tmp_path / "a", runtime)
    _, other = load_case(tmp_path / "b", runtime)
    assert not other.report.notes
    assert_same_model(one, other)


# --- config.json does not decide ----------------------------------------------------------------


def rename(suffix: str, new: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            tensors[name.removesuffix(suffix) + new] = tensors.pop(name)

    return apply


def recast(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors.update({name: change(t) for name, t in tensors.items() if name.endswith(suffix)})

    return apply


def as_deepseek_v4(tensors: Tensors) -> None:
    """Its experts' spelling: int8, and e8m0 in `.scale`."""
    recast(".weight_packed", lambda t: t.view(np.int8))(tensors)
    rename(".weight_packed", ".weight")(tensors)
    recast(".weight_scale", lambda t: t.view(ml_dtypes.float8_e8m0fnu))(tensors)
    rename(".weight_scale", ".scale")(tensors)


def nothing(tensors: Tensors) -> None:
    """The tensors as they are."""


# case, what is done to its tensors, what config.json says of them instead: as a case, or this
SAME = {
    "block scales under another name": (
        "deepseek_v31_fp8",
        rename(".weight_scale_inv", ".weight_scale"),
        None,
    ),
    "block scales, config says rows": ("deepseek_v31_fp8", nothing, "glm4_moe_fp8"),
    "block scales, config says nothing": ("deepseek_v31_fp8", nothing, ""),
    "scales of rows, config says blocks": ("glm4_moe_fp8", nothing, "deepseek_v31_fp8"),
    "scales of rows in one dimension": (
        "glm4_moe_fp8",
        recast(".weight_scale", lambda t: t[:, 0].copy()),
        None,
    ),
    "scales of rows in float32": (
        "glm4_moe_fp8",
        recast(".weight_scale", lambda t: t.astype(np.float32)),
        None,
    ),
    "groups of 32, config says FP8": ("kimi_k2_int4", nothing, "deepseek_v31_fp8"),
    "without their sizes": (
        "kimi_k2_int4",
        lambda t: [t.pop(name) for name in list(t) if name.endswith("_shape")],
        None,
    ),
    "groups of 128, config says 32": ("qwen3_moe_int4", nothing, "kimi_k2_int4"),
    "AWQ, config says GPTQ": ("qwen3_moe_awq", nothing, "qwen3_moe_gptq"),
    "AWQ with bfloat16 scales": (
        "qwen3_moe_awq",
        recast(".scales", lambda t: t.astype(ml_dtypes.bfloat16)),
        None,
    ),
    "GPTQ, config says FP8": ("qwen3_moe_gptq", nothing, "deepseek_v31_fp8"),
    "GPTQ without g_idx": (
        "qwen3_moe_gptq",
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".g_idx")],
        None,
    ),
    "GPTQ by AutoRound": (
        "qwen3_moe_gptq",
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".g_idx")],
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            **{"bits": 4, "group_size": 64, "sym": True},
            "extra_config": {"model.layers.0.mlp.gate": {"bits": 16}},
        },
    ),
    "NVFP4, config says ModelOpt": ("qwen3_moe_nvfp4", nothing, "deepseek_v3_nvfp4"),
    "NVFP4, the factor without a dimension": (
        "qwen3_moe_nvfp4",
        recast(".weight_global_scale", lambda t: t.reshape(())),
        None,
    ),
    "as DeepSeek-V4's experts": ("qwen3_moe_mxfp4", as_deepseek_v4, None),
    "MXFP8 as compressed-tensors names it": (
        "minimax_m2_mxfp8",
        rename(".weight_scale_inv", ".weight_scale"),
        None,
    ),
    "MXFP8 with scales of their own dtype": (
        "minimax_m2_mxfp8",
        recast(".weight_scale_inv", lambda t: t.view(ml_dtypes.float8_e8m0fnu)),
        "deepseek_v31_fp8",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_tensors_decide(tmp_path: Path, name: str, runtime: CpuRuntime) -> None:
    case, change, said_by = SAME[name]
    edit_tensors(tmp_path, case, change)
    hf = tiny_models.hf_config(case)
    if said_by is not None:
        del hf["quantization_config"]
        if said_by:
            is_case = isinstance(said_by, str)
            said = tiny_models.hf_config(said_by)["quantization_config"] if is_case else said_by
            hf["quantization_config"] = said
    (tmp_path / "config.json").write_text(json.dumps(hf))
    config, model = load_case(tmp_path, runtime)
    assert model.host_store is not None
    assert format_summary(model.specs, model.host_store.layouts) == CASES[case]
    if "bfloat16" not in name:
        assert_values_are_stored_ones(case, config, model)
    model.close()


def test_zero_points_and_groups_of_every_kind(tmp_path: Path, runtime: CpuRuntime) -> None:
    """What no whole model has to be compared for: the exact values, from codes written apart."""
    w = np.random.default_rng(3).standard_normal((48, 768)).astype(np.float32)
    name = "a.weight"
    for group, symmetric, v2 in [
        *((64, True, False), (128, False, False), (32, False, True), (384, False, False)),
        *((768, True, True), (96, False, False)),
    ]:
        codes, zero, scale = tiny_quant.uint4_codes(
            w, group, symmetric=symmetric, least_zero=0 if v2 else 1
        )
        wanted = codes.astype(np.float32) - zero.repeat(group, axis=1).astype(np.float32)
        wanted = wanted * scale.astype(np.float32).repeat(group, axis=1)
        tensors = tiny_quant.gptq(group, symmetric=symmetric, v2=v2)(w)
        quant = QuantConfig("uint4_g32", layout="gptq", group=group, zeros_as_they_are=v2)
        np.testing.assert_array_equal(held_values(name, tensors, quant, w.shape), wanted)
        if symmetric:
            tensors = tiny_quant.int4(group)(w)
            wanted = tiny_quant.dequantize({"a" + k: t for k, t in tensors.items()})[name]
            np.testing.assert_array_equal(held_values(name, tensors, quant, w.shape), wanted)
            continue
        for make, scale_dtype in (
            (tiny_quant.awq, tiny_quant.F16),
            (tiny_quant.packed_zeros, tiny_quant.BF16),
        ):
            codes, zero, scale = tiny_quant.uint4_codes(
                w, group, symmetric=False, scale_dtype=scale_dtype
            )
            wanted = codes.astype(np.float32) - zero.repeat(group, axis=1).astype(np.float32)
            wanted = wanted * scale.astype(np.float32).repeat(group, axis=1)
            tensors = make(group)(w)
            np.testing.assert_array_equal(held_values(name, tensors, quant, w.shape), wanted)


def held_values(
    name: str, stored: Tensors, quant: QuantConfig, shape: tuple[int, int]
) -> np.ndarray:
    base = name.removesuffix(".weight")
    tensors = {base + suffix: array for suffix, array in stored.items()}
    headers = {n: Stored(tiny_models.DTYPE_NAMES[t.dtype], t.shape) for n, t in tensors.items()}
    form = find_form(name, headers, quant)
    scales = scale_shape(form.format, *shape)
    assert scales is not None
    parts = [tensors[t.name] for t in form.scale_tensors(name, scales)]
    data = form.hold_weight(tensors[form.weight_name(name)])
    return dequantize(form.format, data, form.hold_scale(*parts))


# --- refusals -----------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.5.up_proj"
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


def put(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name].copy()))

    return apply


def add(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def poison(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def apply(scale: np.ndarray) -> np.ndarray:
        scale.reshape(-1)[1] = value
        return scale

    return apply


def out_of_order(order: np.ndarray) -> np.ndarray:
    order[[0, 100]] = order[[100, 0]]
    return order


ONE = np.ones(1, np.float32)
MISFITS: dict[str, tuple[str, Callable[[Tensors], Any], list[str]]] = {
    "an e8m0 NaN": (
        "qwen3_moe_mxfp4",
        put(f"{EXPERT}.weight_scale", poison(255)),
        [f"{EXPERT}.weight_scale", "(0, 1)", "nan"],
    ),
    "an e8m0 NaN of a leaf": (
        "qwen3_moe_mxfp4",
        put(f"{Q}.weight_scale", poison(255)),
        [f"{Q}.weight_scale", "nan"],
    ),
    "an e8m0 NaN of packed experts": (
        "gpt_oss_mxfp4",
        put(f"{DOWN}_scales", poison(255)),
        [f"{DOWN}_scales", "nan"],
    ),
    "an infinite scale": (
        "kimi_k2_int4",
        put(f"{EXPERT}.weight_scale", poison(np.inf)),
        [f"{EXPERT}.weight_scale", "inf"],
    ),
    "a NaN scale of a row": (
        "glm4_moe_fp8",
        put(f"{Q}.weight_scale", poison(np.nan)),
        [f"{Q}.weight_scale", "nan"],
    ),
    "float16 scales": (
        "kimi_k2_int4",
        put(f"{EXPERT}.weight_scale", lambda s: s.astype(np.float16)),
        [f"{EXPERT}.weight_scale", "stored as F16, wanted BF16"],
    ),
    "missing scales": (
        "kimi_k2_int4",
        lambda t: t.pop(f"{EXPERT}.weight_scale"),
        [f"{EXPERT}.weight_scale' is missing: the scales of", "weight_packed"],
    ),
    "missing scales of packed experts": (
        "gpt_oss_mxfp4",
        lambda t: t.pop(f"{DOWN}_scales"),
        [f"'{DOWN}_scales' is missing"],
    ),
    "missing values of packed experts": (
        "gpt_oss_mxfp4",
        lambda t: t.pop(f"{DOWN}_blocks"),
        [f"'{DOWN}_blocks' is missing"],
    ),
    "other groups": (
        "qwen3_moe_int4",
        put(f"{Q}.weight_scale", lambda s: s.repeat(8, axis=1)),
        [f"{Q}.weight_packed", "256 inputs a row with 16 scales", "multiple of 32"],
    ),
    "one expert of other groups": (
        "qwen3_moe_int4",
        put(f"{EXPERT}.weight_scale", lambda s: s.repeat(4, axis=1)),
        [f"{EXPERT}.weight_scale", "wanted [256, 2]"],
    ),
    "zero points": (
        "qwen3_moe_int4",
        add(f"{Q}.weight_zero_point", np.ones((4, 4), np.int32)),
        [f"{Q}.weight_zero_point", "shape [4, 4], wanted [128, 2]"],
    ),
    "zero points of FP4": (
        "qwen3_moe_mxfp4",
        add(f"{Q}.weight_zero_point", np.ones((4, 4), np.int32)),
        [f"{Q}.weight_zero_point", "zero points", "4-bit ones in int32"],
    ),
    "zero points of an expert that lacks them": (
        "glm4_moe_int4",
        lambda t: t.pop(f"{EXPERT}.weight_zero_point"),
        [f"{EXPERT}.weight_zero_point' is missing"],
    ),
    "zero points of one expert": (
        "kimi_k2_int4",
        add(f"{EXPERT}.weight_zero_point", np.ones((4, 4), np.int32)),
        [f"{EXPERT}.weight_zero_point", "not part of this model"],
    ),
    "columns in another order": (
        "qwen3_moe_int4",
        add(f"{Q}.weight_g_idx", np.arange(256, dtype=np.int32)),
        [f"{Q}.weight_g_idx", "order of their activations"],
    ),
    "scales of activations": ("glm4_moe_fp8", add(f"{Q}.input_scale", ONE), [f"{Q}.input_scale"]),
    "NVFP4 without its factor": (
        "qwen3_moe_nvfp4",
        lambda t: t.pop(f"{Q}.weight_global_scale"),
        [f"{Q}.weight_global_scale' is missing"],
    ),
    "NVFP4 of one expert without its factor": (
        "deepseek_v3_nvfp4",
        lambda t: t.pop(f"{EXPERT}.weight_scale_2"),
        [f"{EXPERT}.weight_scale_2' is missing"],
    ),
    "a factor of zero": (
        "qwen3_moe_nvfp4",
        put(f"{EXPERT}.weight_global_scale", np.zeros_like),
        [f"{EXPERT}.weight_scale", "factor", "above 0"],
    ),
    "NVFP4's scale is NaN": (
        "qwen3_moe_nvfp4",
        put(f"{Q}.weight_scale", poison(np.nan)),
        [f"{Q}.weight_scale", "nan"],
    ),
    "GPTQ in the order of activations": (
        "qwen3_moe_gptq",
        put(f"{EXPERT}.g_idx", out_of_order),
        [f"{EXPERT}.scales", "desc_act"],
    ),
    "a leaf of GPTQ in the order of activations": (
        "qwen3_moe_gptq",
        put(f"{Q}.g_idx", out_of_order),
        [f"{Q}.scales", "desc_act"],
    ),
    "AWQ in groups of 16": (
        "qwen3_moe_awq",
        put(f"{Q}.scales", lambda s: s.repeat(8, axis=0)),
        [f"{Q}.qweight", "16 scales", "multiple of 32"],
    ),
    "AWQ of 8 bits": (
        "qwen3_moe_awq",
        put(f"{Q}.qweight", lambda w: w.repeat(2, axis=1)[:, :200]),
        [f"{Q}.qweight", "4-bit"],
    ),
    "AWQ without zero points": (
        "qwen3_moe_awq",
        lambda t: t.pop(f"{EXPERT}.qzeros"),
        [f"{EXPERT}.qzeros' is missing"],
    ),
    "AWQ without scales": (
        "qwen3_moe_awq",
        lambda t: t.pop(f"{Q}.scales"),
        [f"{Q}.scales' is missing"],
    ),
    "float32 scales of AWQ": (
        "qwen3_moe_awq",
        put(f"{EXPERT}.scales", lambda s: s.astype(np.float32)),
        [f"{EXPERT}.scales", "stored as F32, wanted F16 or BF16"],
    ),
    "a scale of the whole tensor": (
        "glm4_moe_fp8",
        put(f"{Q}.weight_scale", lambda s: s[:1, 0]),
        [f"{Q}.weight_scale", "shape [1]", "of rows"],
    ),
    "packed INT8": (
        "qwen3_moe_int4",
        put(f"{Q}.weight_packed", lambda w: w.repeat(2, axis=1)),
        [f"{Q}.weight_packed", "shape [1024, 64], wanted [1024, 32]"],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused_by_name(tmp_path: Path, name: str, runtime: CpuRuntime) -> None:
    case, change, messages = MISFITS[name]
    edit_tensors(tmp_path, case, change)
    with pytest.raises(CheckpointError) as caught:
        load_case(tmp_path, runtime)
    assert str(tmp_path) in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("width", [144, 160])
def test_rows_without_whole_groups_are_refused(width: int) -> None:
    from jaxmoe.weights.tensor_table import expert_layouts

    hf = tiny_models.hf_config("qwen3_moe_int4" if width == 160 else "qwen3_moe_mxfp4")
    config = ModelConfig.from_hf(hf | {"moe_intermediate_size": width})
    with pytest.raises(ConfigError, match=f"down of the experts of layer 0.*{width}"):
        expert_layouts(config, registry.configured_formats(config))
    config = ModelConfig.from_hf(hf | {"head_dim": 18, "num_attention_heads": 8})
    with pytest.raises(ConfigError, match="linear map of 256 outputs.*144"):
        registry.describe_model(config, "bfloat16", registry.configured_formats(config))


def test_a_sized_tensor_that_belongs_to_nothing_is_refused(
    tmp_path: Path, runtime: CpuRuntime
) -> None:
    tensors = dict(tiny_models.make_tensors("qwen3_moe"))
    tensors[f"{Q}.weight_shape"] = np.array([1024, 256], np.int32)
    write_checkpoint(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.hf_config("qwen3_moe")))
    with pytest.raises(CheckpointError, match="weight_shape.*not part of this model"):
        load_case(tmp_path, runtime)


def test_a_nested_text_model_is_the_same(tmp_path: Path, runtime: CpuRuntime) -> None:
    """Kimi-K2.5 around Kimi-K2-Thinking: names with a prefix, and the format in `text_config`."""
    tensors = tiny_models.write_checkpoint(tmp_path / "a", "kimi_k2_int4")
    text = tiny_models.hf_config("kimi_k2_int4")
    hf = tiny_models.hf_config("kimi_k25") | {"text_config": text}
    hf |= {key: text[key] for key in ("bos_token_id", "eos_token_id")}
    nested = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    nested["vision_tower.patch_embed.proj.weight"] = np.ones((4, 4), np.float32)
    write_checkpoint(tmp_path / "b", nested, num_shards=2)
    (tmp_path / "b" / "config.json").write_text(json.dumps(hf))
    _, one = load_case(tmp_path / "a", runtime)
    _, other = load_case(tmp_path / "b", runtime)
    # Its one matrix that is not read is of the part that sees.
    shapes = [name for name in tensors if name.endswith("weight_shape")]
    assert len(one.report.ignored) == len(shapes)
    assert len(other.report.ignored) == len(shapes) + 1
    assert_same_model(one, other)
