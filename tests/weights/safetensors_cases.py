"""Small checkpoints and ways to damage them, shared by the tests of this folder."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.weights.safetensors_writer import write_checkpoint

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
