"""Small checkpoints and ways to damage them, and ways to look at what was loaded."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.models import registry
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.param_spec import dotted
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import write_checkpoint
from jaxmoe.weights.tensor_table import MATRICES
from support import tiny_models

SHARD_1 = "model-00001-of-00002.safetensors"
SHARD_2 = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def some_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """One tensor of each dtype that matters, of odd sizes so that nothing is aligned by luck."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (13, 7), np.uint8)
    return {
        "a.weight": codes.view(ml_dtypes.float8_e4m3fn),
        "a.weight_scale_inv": rng.standard_normal((1, 1), np.float32),
        "b.weight": rng.standard_normal((3, 5), np.float32).astype(ml_dtypes.bfloat16),
        "c.bias": rng.standard_normal(3, np.float32),
        "d.table": rng.integers(0, 9, (2, 2, 2), np.int64),
        "e.scalar": np.array(2.5, np.float32),
        "f.empty": np.zeros((0, 4), np.float32),
    }


def write(directory: Path, num_shards: int = 1) -> dict[str, np.ndarray]:
    tensors = some_tensors()
    write_checkpoint(directory, tensors, num_shards=num_shards)
    return tensors


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(file: Path, header: dict[str, Any] | str | bytes, data: bytes) -> None:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@functools.cache
def _made(case: str) -> Mapping[str, np.ndarray]:
    return tiny_models.make_tensors(case)


def edit_tensors(
    directory: Path, case: str, change: Callable[[dict[str, np.ndarray]], object]
) -> None:
    """A tiny checkpoint with some tensors changed; headers are right for what is there."""
    tensors = dict(_made(case))
    change(tensors)
    write_checkpoint(directory, tensors)
    (directory / "config.json").write_text(json.dumps(tiny_models.hf_config(case)))


def load_case(
    directory: Path, runtime: CpuRuntime, **options: Any
) -> tuple[ModelConfig, LoadedModel]:
    with Checkpoint.open(directory) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config())
        return config, load_model(checkpoint, config, registry, runtime, **options)


def store_bytes(model: LoadedModel) -> bytes:
    """Weights and scales of all experts, in order."""
    store = model.host_store
    assert store is not None
    parts: list[bytes] = []
    for layer, layout in enumerate(store.layouts):
        for expert in range(layout.num_experts):
            for which in MATRICES:
                parts.append(store.matrix(layer, expert, which).tobytes())
                if layout.scale_shape(which) is not None:
                    parts.append(store.scale(layer, expert, which).tobytes())
    return b"".join(parts)


def leaves_of(model: LoadedModel) -> dict[str, np.ndarray]:
    return {dotted(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(model.state)}


def experts_output(model: LoadedModel, runtime: CpuRuntime) -> np.ndarray:
    """What every expert of every layer makes of the same input, `[layers, E, D]`."""
    store = model.host_store
    assert store is not None
    ops = NativeOps(runtime, store, "vector")
    layout = store.layouts[0]
    x = np.random.default_rng(0).standard_normal((layout.num_experts, layout.hidden), np.float32)
    ids = np.arange(layout.num_experts, dtype=np.int32)[:, None]
    ones = np.ones_like(ids, np.float32)
    outputs = [
        jax.jit(lambda x, layer=layer: ops.experts(x, ids, ones, layer))(x)
        for layer in range(len(store.layouts))
    ]
    return np.stack([np.asarray(y) for y in outputs])


def assert_same_model(one: LoadedModel, other: LoadedModel) -> None:
    assert_same_leaves(one, other)
    assert store_bytes(one) == store_bytes(other)
    one.close()
    other.close()


def assert_same_leaves(one: LoadedModel, other: LoadedModel) -> None:
    a, b = leaves_of(one), leaves_of(other)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path
