"""Loading: every value where it belongs, bit for bit, and nothing begun that cannot end well."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from support import tiny_models
from support.checkpoints import (
    assert_same_leaves,
    assert_same_model,
    edit_tensors,
    experts_output,
    leaves_of,
    load_case,
)

from jaxmoe.common.errors import CapacityError, CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.models.names import HfNames
from jaxmoe.weights import loader, memory
from jaxmoe.weights.host_store import HostStore
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.random_init import random_model
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import write_checkpoint
from jaxmoe.weights.tensor_table import MATRICES

CASES = ["deepseek_v2_lite", "deepseek_v3_fp8", "kimi_k2_fp8", "qwen3_moe", "qwen3_moe_fp8"]


@pytest.mark.parametrize("case", CASES)
def test_experts_are_bit_equal_to_the_source(
    tmp_path: Path, case: str, runtime: CpuRuntime
) -> None:
    tensors = tiny_models.write_checkpoint(tmp_path, case)
    config, model = load_case(tmp_path, runtime)
    store = model.host_store
    assert store is not None
    for moe_idx, layer in enumerate(config.moe_layers):
        for expert in range(config.moe.router.num_experts):
            for which in MATRICES:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{which}_proj.weight"
                held = store.matrix(moe_idx, expert, which)
                assert held.tobytes() == tensors[name].tobytes(), name
                if f"{name}_scale_inv" in tensors:
                    scale = tensors[f"{name}_scale_inv"].astype(np.float32)
                    np.testing.assert_array_equal(store.scale(moe_idx, expert, which), scale)
    model.close()


@pytest.mark.parametrize("case", CASES)
def test_leaves_are_bit_equal_to_the_source(tmp_path: Path, case: str, runtime: CpuRuntime) -> None:
    tensors = tiny_models.write_checkpoint(tmp_path, case)
    config, model = load_case(tmp_path, runtime)
    leaves = leaves_of(model)
    assert leaves.keys() == model.specs.keys()
    assert leaves["embedding.data"].tobytes() == tensors["model.embed_tokens.weight"].tobytes()
    assert leaves["lm_head.data"].tobytes() == tensors["lm_head.weight"].tobytes()
    o_name = "model.layers.1.self_attn.o_proj.weight"
    assert leaves["layers.1.attention.o.data"].tobytes() == tensors[o_name].tobytes()
    norm = tensors["model.layers.2.input_layernorm.weight"].astype(np.float32)
    np.testing.assert_array_equal(leaves["layers.2.attention_norm.weight"], norm)
    if config.quant.format == "fp8_block":
        scale = tensors[f"{o_name}_scale_inv"].astype(np.float32)
        np.testing.assert_array_equal(leaves["layers.1.attention.o.scale_inv"], scale)
    if "layers.1.attention.w_uk.data" in leaves:
        kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
        heads, latent = config.attention.num_heads, kv_b.shape[1]
        joint = kv_b.reshape(heads, -1, latent)
        nope = config.attention.nope_head_dim
        w_uk = np.ascontiguousarray(joint[:, :nope].transpose(0, 2, 1))
        assert leaves["layers.1.attention.w_uk.data"].tobytes() == w_uk.tobytes()
        w_uv = np.ascontiguousarray(joint[:, nope:])
        assert leaves["layers.1.attention.w_uv.data"].tobytes() == w_uv.tobytes()
    model.close()


def test_shards_and_single_file_load_the_same(tmp_path: Path, runtime: CpuRuntime) -> None:
    tensors = tiny_models.write_checkpoint(tmp_path / "sharded", "qwen3_moe_fp8")
    assert (tmp_path / "sharded/model.safetensors.index.json").exists()
    single = tmp_path / "single"
    single.mkdir()
    tiny_models.write_safetensors(single / "model.safetensors", tensors)
    (single / "config.json").write_text((tmp_path / "sharded/config.json").read_text())
    _, one = load_case(tmp_path / "sharded", runtime)
    _, other = load_case(single, runtime)
    assert_same_model(one, other)


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe"])
def test_mmap_backing_holds_the_same(tmp_path: Path, case: str, runtime: CpuRuntime) -> None:
    tiny_models.write_checkpoint(tmp_path, case)
    _, arena = load_case(tmp_path, runtime)
    _, mapped = load_case(tmp_path, runtime, backing="mmap")
    assert arena.host_store is not None
    layouts = arena.host_store.layouts
    assert_same_leaves(arena, mapped)
    np.testing.assert_array_equal(experts_output(arena, runtime), experts_output(mapped, runtime))
    weights = sum(layout.num_experts * 3 * layout.matrix_bytes for layout in layouts)
    assert arena.report.read_bytes - mapped.report.read_bytes == weights
    assert arena.report.planned_bytes - mapped.report.planned_bytes == weights


def test_mmap_of_unaligned_values_is_refused(tmp_path: Path, runtime: CpuRuntime) -> None:
    """Safetensors may start a BF16 tensor at an odd byte; no kernel can read that in place."""
    tensors = {"a": np.zeros(1, np.uint8), **tiny_models.make_tensors("qwen3_moe")}
    write_checkpoint(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.hf_config("qwen3_moe")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfNames, "ignored", lambda self, name: name == "a")
        load_case(tmp_path, runtime)[1].close()
        with pytest.raises(CheckpointError, match="no multiple of its element's size") as caught:
            load_case(tmp_path, runtime, backing="mmap")
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "experts" in str(caught.value)


@pytest.mark.parametrize("case", ["deepseek_v3_fp8", "qwen3_moe"])
def test_split_over_numa_nodes(tmp_path: Path, case: str, runtime: CpuRuntime) -> None:
    """Loaded and invented weights are the same ones on any number of nodes."""
    tiny_models.write_checkpoint(tmp_path, case)
    config, whole = load_case(tmp_path, runtime)
    invented = random_model(config, registry, runtime)
    with CpuRuntime(num_threads=2, numa_nodes=[[0], [0]]) as nodes:
        _, split = load_case(tmp_path, nodes)
        assert split.host_store is not None and len(split.host_store.bytes_per_node()) == 2
        also = random_model(config, registry, nodes)
        for one, two in ((whole, split), (invented, also)):
            expected = experts_output(one, runtime)
            np.testing.assert_array_equal(expected, experts_output(two, nodes))
            one.close()
            two.close()


def test_leaves_are_adopted_without_a_copy(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_checkpoint(tmp_path, "deepseek_v3_fp8")
    given: dict[int, np.ndarray] = {}
    real = loader.to_jax

    def watch(array: np.ndarray) -> jax.Array:
        given[array.ctypes.data] = array
        return real(array)

    monkeypatch.setattr(loader, "to_jax", watch)
    _, model = load_case(tmp_path, runtime)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in model.leaves}
    assert pointers == set(given) and len(pointers) == len(model.specs)
    model.close()


def test_memory_stays_within_the_plan(tmp_path: Path, runtime: CpuRuntime) -> None:
    """What Python allocates is the leaves and one transform a thread: never a copy of experts."""
    tiny_models.write_checkpoint(tmp_path, "deepseek_v3_fp8")
    load_case(tmp_path, runtime)[1].close()  # imports and compiled helpers are not the load's
    tracemalloc.start()
    try:
        _, model = load_case(tmp_path, runtime, num_threads=1)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    report = model.report
    tables = 3_000_000  # headers, tables and descriptions of some 500 tensors
    assert report.expert_bytes > tables, "the model is too small for this test to see a copy"
    assert peak <= report.planned_bytes - report.expert_bytes + tables
    assert report.leaf_bytes <= held <= report.leaf_bytes + tables
    model.close()


def test_report_says_what_happened(tmp_path: Path, runtime: CpuRuntime) -> None:
    tensors = tiny_models.write_checkpoint(tmp_path, "deepseek_v3_fp8")
    _, model = load_case(tmp_path, runtime)
    report = model.report
    assert report.num_tensors + len(report.ignored) == len(tensors)
    assert any(name.endswith("eh_proj.weight") for name in report.ignored)
    text = report.describe()
    assert "GB/s" in text and "peak" in text and "not needed" in text and str(tmp_path) in text
    model.close()


def test_progress_bar(
    tmp_path: Path, runtime: CpuRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    load_case(tmp_path, runtime)[1].close()
    assert capsys.readouterr() == ("", "")
    load_case(tmp_path, runtime, progress=True)[1].close()
    out, err = capsys.readouterr()
    assert out == "" and "loading weights: 100%" in err and "B/s" in err


# --- what does not fit the model ----------------------------------------------------------------

Tensors = dict[str, np.ndarray]
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
NORM = "model.norm.weight"


def put(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return apply


def poison(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(scale: np.ndarray) -> np.ndarray:
        scale = scale.copy()
        scale[0, 1] = value
        return scale

    return apply


MISFITS: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "missing expert": (lambda t: t.pop(EXPERT), [f"tensor '{EXPERT}' is missing"]),
    "missing norm": (lambda t: t.pop(NORM), [f"tensor '{NORM}' is missing"]),
    "missing linear": (lambda t: t.pop(Q_A), [f"tensor '{Q_A}' is missing"]),
    "missing first expert": (
        lambda t: t.pop(EXPERT.replace(".5.up", ".0.gate")),
        ["experts.0.gate_proj.weight' is missing"],
    ),
    "extra": (
        lambda t: t.update({"model.extra": np.ones(3, np.float32)}),
        ["tensor 'model.extra': is not part of this model"],
    ),
    "expert transposed": (
        put(EXPERT, lambda w: np.ascontiguousarray(w.T)),
        [EXPERT, "shape [256, 160], wanted [160, 256]"],
    ),
    "norm shape": (put(NORM, lambda w: w[:-1]), [NORM, "shape [255], wanted [256]"]),
    "float16": (put(NORM, lambda w: w.astype(np.float16)), [NORM, "stored as F16"]),
    "float16 linear": (
        put("lm_head.weight", lambda w: w.astype(np.float16)),
        ["lm_head.weight", "stored as F16", "BF16"],
    ),
    "one expert in BF16": (
        put(EXPERT, lambda w: w.astype(ml_dtypes.bfloat16)),
        [EXPERT, "stored as BF16, wanted F8_E4M3"],
    ),
    "e5m2": (put(EXPERT, lambda w: w.view(ml_dtypes.float8_e5m2)), [EXPERT, "F8_E5M2"]),
    "scale without weight": (
        lambda t: t.pop(EXPERT),
        [f"'{EXPERT}' is missing"],
    ),
    "weight without scale": (
        lambda t: t.pop(f"{EXPERT}_scale_inv"),
        [f"'{EXPERT}_scale_inv' is missing: the scales of '{EXPERT}'"],
    ),
    "linear without scale": (
        lambda t: t.pop(f"{Q_A}_scale_inv"),
        [f"'{Q_A}_scale_inv' is missing"],
    ),
    "scale shape": (
        put(f"{EXPERT}_scale_inv", lambda s: s.reshape(1, 4)),
        [f"{EXPERT}_scale_inv", "shape [1, 4], wanted [2, 2]"],
    ),
    "scale dtype": (
        put(f"{EXPERT}_scale_inv", lambda s: s.astype(np.float64)),
        [f"{EXPERT}_scale_inv", "stored as F64, wanted F32 or BF16"],
    ),
    "scale of a plain weight": (
        lambda t: t.update({"lm_head.weight_scale_inv": np.ones((4, 2), np.float32)}),
        ["'lm_head.weight_scale_inv': holds scales", "'lm_head.weight' is stored as BF16"],
    ),
    "scale of an expert not FP8": (
        put(Q_A, lambda w: w.astype(ml_dtypes.bfloat16)),
        [f"'{Q_A}_scale_inv'"],
    ),
    "NaN scale": (put(f"{EXPERT}_scale_inv", poison(np.nan)), [f"{EXPERT}_scale_inv", "(0, 1)"]),
    "Inf scale": (put(f"{Q_A}_scale_inv", poison(np.inf)), [f"{Q_A}_scale_inv", "is inf"]),
    "NaN kv_b scale": (
        put("model.layers.1.self_attn.kv_b_proj.weight_scale_inv", poison(-np.inf)),
        ["kv_b_proj.weight_scale_inv", "is -inf"],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused_by_name(tmp_path: Path, name: str, runtime: CpuRuntime) -> None:
    change, messages = MISFITS[name]
    edit_tensors(tmp_path, "deepseek_v3_fp8", change)
    with pytest.raises(CheckpointError) as caught:
        load_case(tmp_path, runtime)
    assert str(tmp_path) in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


def test_all_misfits_are_counted_before_data_is_touched(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if ".experts.3." in name:
                del tensors[name]
        tensors["other.weight"] = np.ones(1, np.float32)
        tensors[NORM] = tensors[NORM][:7]

    edit_tensors(tmp_path, "deepseek_v3_fp8", change)
    monkeypatch.setattr(Checkpoint, "read_into", None)
    monkeypatch.setattr(HostStore, "create", None)
    with pytest.raises(CheckpointError, match="tensors do not fit the model") as caught:
        load_case(tmp_path, runtime)
    text = str(caught.value)
    config = ModelConfig.from_hf(tiny_models.hf_config("deepseek_v3_fp8"))
    # Three matrices and three scales in every MoE layer, one extra, one of wrong shape.
    assert f"{6 * len(config.moe_layers) + 2} tensors" in text
    assert text.count("\n") == 9 and text.endswith(" more")


def test_config_of_another_model(tmp_path: Path, runtime: CpuRuntime) -> None:
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    other = tiny_models.hf_config("deepseek_v3_fp8")
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="tensors do not fit the model"):
        load_case(tmp_path, runtime)


def test_config_of_a_far_larger_model_is_refused_before_all_is_looked_for(
    tmp_path: Path, runtime: CpuRuntime
) -> None:
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    config = tiny_models.hf_config("qwen3_moe") | {"num_experts": 1 << 20}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="at least 4000 tensors do not fit the model"):
            load_case(tmp_path, runtime)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_config_of_a_far_deeper_model_is_refused_before_it_is_made(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    config = tiny_models.hf_config("qwen3_moe")
    layers = config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 511}))
    monkeypatch.setattr(registry, "describe_model", None)
    with pytest.raises(CheckpointError, match=f"511 layers .* of {layers}:"):
        load_case(tmp_path, runtime)


# --- damage and shortage while loading ----------------------------------------------------------


def test_truncated_during_load(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file loses its second half after half of the experts were read."""
    tiny_models.write_checkpoint(tmp_path, "deepseek_v2_lite")
    file = tmp_path / "model.safetensors"
    real, calls = HostStore.read_matrix, []

    def read_then_cut(self: HostStore, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 10:
            os.truncate(file, file.stat().st_size // 2)
        real(self, *args)

    monkeypatch.setattr(HostStore, "read_matrix", read_then_cut)
    with pytest.raises(CheckpointError) as caught:
        load_case(tmp_path, runtime)
    assert str(file) in str(caught.value) and "tensor '" in str(caught.value)
    assert "while it was being read" in str(caught.value)


def test_short_read_of_an_expert(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but unseen by the size check: the native read itself must notice."""
    tiny_models.write_checkpoint(tmp_path, "deepseek_v2_lite")
    file = tmp_path / "model.safetensors"
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(Checkpoint, "check_unchanged", lambda self, info: None)
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError) as caught:
            load_model(checkpoint, config, registry, runtime)
    assert str(file) in str(caught.value) and "tensor '" in str(caught.value)


def test_refused_when_memory_is_short(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_checkpoint(tmp_path, "qwen3_moe")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    monkeypatch.setattr(HostStore, "create", None)
    with pytest.raises(CapacityError, match=r"needs .*\(\d+ bytes\).*\(1000000 bytes\)"):
        load_case(tmp_path, runtime)


def test_failed_load_closes_the_store(
    tmp_path: Path, runtime: CpuRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_tensors(tmp_path, "deepseek_v3_fp8", MISFITS["NaN scale"][0])
    closed: list[HostStore] = []
    real = HostStore.close
    monkeypatch.setattr(HostStore, "close", lambda self: (closed.append(self), real(self))[1])
    with pytest.raises(CheckpointError):
        load_case(tmp_path, runtime)
    assert len(closed) == 1


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    def count() -> int:
        files = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(file).endswith(".safetensors") for file in files)

    before = count()
    yield
    assert count() == before
