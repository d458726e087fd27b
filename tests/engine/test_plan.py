"""The plan of a start, held against the peak memory of a process that made it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support import tiny_models

from jaxmoe.cli import batch, generate
from jaxmoe.common.errors import CheckpointError, ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import step_shapes
from jaxmoe.engine import plan as planning
from jaxmoe.engine.plan import make_plan, temporary_bytes
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.models import registry
from jaxmoe.models.decoder import cache_spec
from jaxmoe.weights import memory
from jaxmoe.weights.host_store import HostStore
from jaxmoe.weights.memory import Room
from jaxmoe.weights.tensor_table import expert_layouts

CHILD = Path(__file__).parents[1] / "support" / "memory_child.py"
MAKE = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
MLA = {"hidden_size": 1024, "moe_intermediate_size": 1024, "intermediate_size": 2048}
GQA = {"hidden_size": 1024, "moe_intermediate_size": 768, "intermediate_size": 2048}
ONE = {"max_num_seqs": 1, "prefill_chunk_tokens": 16}
TWO = {"max_num_seqs": 2, "prefill_chunk_tokens": 64}
# A tiny model's config, what makes it some hundred MB, the format, and the options of the start.
CASES = {
    "qwen3_bf16": (
        "qwen3_moe",
        GQA | {"num_experts": 64, "num_hidden_layers": 2},
        "bf16",
        ONE | {"kv_cache_gb": 0.05},
    ),
    "qwen3_fp8": (
        "qwen3_moe",
        GQA | {"num_experts": 128, "num_hidden_layers": 3},
        "fp8",
        TWO | {"kv_cache_gb": 0.2},
    ),
    "qwen3_float32": (
        "qwen3_moe",
        GQA | {"num_experts": 64},
        "fp8",
        ONE | {"compute_dtype": "float32"},
    ),
    "v3_fp8": ("deepseek_v3_fp8", MLA | {"n_routed_experts": 64}, "fp8", TWO),
    "v2_lite_bf16": ("deepseek_v2_lite", MLA | {"n_routed_experts": 32}, "bf16", TWO),
    "next_fp8": ("qwen3_next", GQA | {"num_experts": 64}, "fp8", TWO | {"state_cache_gb": 0.05}),
    "kimi_fp8": ("kimi_k2_fp8", MLA | {"n_routed_experts": 64}, "fp8", ONE | {"kv_cache_gb": 0.3}),
}


def make(folder: Path, case: str) -> EngineConfig:
    """Writes the case's checkpoint with tools/make_checkpoint.py; the options of its start."""
    name, wider, format, options = CASES[case]
    spec = importlib.util.spec_from_file_location("make_checkpoint", MAKE)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    file = folder / "config.json"
    file.write_text(json.dumps(tiny_models.hf_config(name) | wider))
    output = folder / "checkpoint"
    assert tool.main([f"--config={file}", f"--output={output}", f"--format={format}"]) == 0
    return EngineConfig.of(
        {"model": str(output), "cache_dir": "", "show_progress": False} | options
    )


def measure(config: EngineConfig) -> dict[str, int]:
    """Peak and programs of a process with this config that compiles everything."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(options)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def planned_elsewhere(config: EngineConfig, tmp_path: Path) -> int:
    """The peak that --plan_only computes in a process of its own."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    code = (
        "import json, sys; from jaxmoe.engine.plan import *\n"
        "print(make_plan(EngineConfig.of(json.loads(sys.argv[1]))).peak_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if i == 0 else pytest.mark.slow) for i, c in enumerate(CASES)]
)
def test_predicted_peak_is_within_5_percent_of_a_real_process(case, tmp_path):
    config = make(tmp_path, case)
    planned = planned_elsewhere(config, tmp_path)
    measured = measure(config)
    assert measured["programs"] == len(
        step_shapes(config.max_num_seqs, config.prefill_chunk_tokens)
    )
    error = planned / measured["peak_bytes"] - 1
    print(f"{case}: planned {planned >> 20} MiB, {measured['peak_bytes'] >> 20} MiB, {error:+.1%}")
    assert abs(error) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deepseek_v3_cut", "deepseek_v2_lite_cut", "qwen3_30b_a3b_cut", "olmoe_like"]
)
def test_temporaries_are_what_xla_says_at_real_dimensions(name):
    """Two layers, compiled for weights that are never made."""
    raw = json.loads((Path(__file__).parents[2] / "configs/bench" / f"{name}.json").read_text())
    model = ModelConfig.from_hf(raw | {"num_hidden_layers": 2})
    formats = registry.configured_formats(model)
    described = registry.describe_model(model, "bfloat16", formats)
    leaves = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype))
        for path, spec in described.specs.items()
    }
    caches = [
        tuple(jax.ShapeDtypeStruct((4, 16, a.num_heads, a.head_dim), a.dtype) for a in layer)
        for layer in cache_spec(model, "bfloat16")
    ]
    tokens = 64
    ints = {n: jax.ShapeDtypeStruct((tokens,), jnp.int32) for n in ("ids", "pos", "rows", "slots")}
    step = StepInputs(*ints.values(), jax.ShapeDtypeStruct((1, 4), jnp.int32))  # pyright: ignore
    with CpuRuntime(num_threads=1) as runtime:
        store = HostStore.create(runtime, expert_layouts(model, formats))  # maps, touches nothing
        ops = NativeOps(runtime, store, "matrix")

        def run(state, caches, step):
            merged = nnx.merge(described.graphdef, state)
            return merged(step, caches, ops, jnp.zeros(1, jnp.int32))

        program = jax.jit(run, donate_argnums=1).lower(described.fill(leaves), caches, step)
        stated = program.compile().memory_analysis().temp_size_in_bytes
        store.close()
    planned = temporary_bytes(tokens, model)
    print(f"{name}: planned {planned >> 10} KiB, XLA {stated >> 10} KiB")
    assert abs(planned / stated - 1) <= 0.10


def test_recurrent_states_are_counted(tmp_path):
    tiny_models.write_checkpoint(tmp_path / "tiny", "qwen3_next")
    plans = {}
    for name, options in (
        ("default", {}),
        ("small", {"state_cache_gb": 0.01}),
        ("off", {"prefix_cache": False}),
        ("more", {"prefix_cache": False, "max_num_seqs": 9}),
    ):
        config = EngineConfig.of({"model": str(tmp_path / "tiny"), "kv_cache_gb": 0.01} | options)
        items = {item.name: item.nbytes for item in make_plan(config).items}
        plans[name] = items["recurrent states"]
    one = 3 * 4 * (4 * 128 * 128 + 3 * (2 * 2 * 128 + 4 * 128))
    assert plans["off"] == 8 * one and plans["more"] == 9 * one
    assert plans["small"] == (8 + int(0.01 * 2**30) // one) * one
    assert plans["default"] == (8 + 2**30 // one) * one


@pytest.fixture
def tiny(tmp_path):
    tiny_models.write_checkpoint(tmp_path / "tiny", "deepseek_v3_fp8")
    return tmp_path / "tiny"


def peak(**options) -> int:
    return make_plan(EngineConfig.of(options)).peak_bytes


def test_every_option_that_takes_memory_shows(tiny):
    base = {"model": str(tiny), "kv_cache_gb": 0.01}
    items = {item.name: item for item in make_plan(EngineConfig.of(base)).items}
    kv = items["KV cache"].nbytes
    assert 0.9 * 0.01 * 2**30 < kv <= 0.01 * 2**30
    mapped = make_plan(EngineConfig.of(base | {"backing": "mmap"}))
    less = {item.name: item.nbytes for item in mapped.items}["routed experts"]
    assert mapped.reclaimable_bytes == items["routed experts"].nbytes - less > 0
    assert peak(**base, max_num_seqs=64) > peak(**base, max_num_seqs=1)
    assert peak(**base, prefill_chunk_tokens=4096) > peak(**base, prefill_chunk_tokens=16)
    dummy = make_plan(EngineConfig.of(base | {"load_format": "dummy"}))
    assert dummy.items[0].nbytes == items["routed experts"].nbytes


@pytest.mark.parametrize(
    ("short_bytes", "flags"),
    [
        (5 << 20, {"--kv_cache_gb", "--backing", "--prefill_chunk_tokens"}),
        (60 << 20, {"--max_model_len", "--backing", "--prefill_chunk_tokens"}),
    ],
)
def test_suggestions_do_what_they_say(tiny, monkeypatch, short_bytes, flags):
    """Each flag offered, given to a new plan, needs what was promised."""
    options = {"model": str(tiny), "prefill_chunk_tokens": 2048, "max_model_len": 4096}
    options |= {"kv_cache_gb": 0.06}
    make_plan(EngineConfig.of(options))  # what only the first plan takes is taken
    free = make_plan(EngineConfig.of(options)).peak_bytes - short_bytes
    monkeypatch.setattr(planning.memory, "rooms", lambda: [Room(free, "bound")])
    monkeypatch.setattr(planning.memory, "anonymous_bytes", lambda: 0)
    plan = make_plan(EngineConfig.of(options))
    assert not plan.fits and {c.flag.split("=")[0] for c in plan.changes} == flags
    own = memory.peak_rss_bytes()
    for change in plan.changes:
        given = dict(part.removeprefix("--").split("=") for part in change.flag.split())
        numbers = {k: float(v) if "gb" in k else int(v) for k, v in given.items() if k != "backing"}
        again = peak(**options | given | numbers)
        assert abs(again - change.peak_bytes) <= memory.peak_rss_bytes() - own + (1 << 20)
        assert change.peak_bytes < plan.peak_bytes
    assert "use --kv_cache_gb=" in plan.describe() or short_bytes > 5 << 20


@pytest.mark.parametrize("command", [generate, batch])
@pytest.mark.parametrize(("free", "code"), [(1 << 50, 0), (1 << 20, 3)])
def test_plan_only(tiny, monkeypatch, capsys, command, free, code):
    monkeypatch.setattr(planning.memory, "rooms", lambda: [Room(free, "a made-up bound")])
    monkeypatch.setattr(planning.memory, "anonymous_bytes", lambda: 0)
    assert command.main(["x", f"--model={tiny}", "--plan_only"]) == code
    out = capsys.readouterr().out
    assert ("DOES NOT FIT: needs" in out) is bool(code) and "a made-up bound" in out
    assert ("use --backing=mmap" in out or "not enough alone" in out) is bool(code)


def test_plan_only_of_what_cannot_start_is_an_error(tmp_path, capsys):
    assert generate.main(["jaxmoe_generate", "--model=/no/such", "--plan_only"]) == 1
    assert "no such directory" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        make_plan(EngineConfig(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="max_model_len"):
        make_plan(EngineConfig(max_model_len=1 << 20))
