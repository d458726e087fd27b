"""A tiny DeepSeek-V3-like checkpoint with a draft head whose guesses are sometimes right.

The published layout of the case "deepseek_v3" with two of its layers. What layers add to the
residual stream is made small, and the head's joining map hands on the next token's embedding, so
that head and model mostly, and not always, agree on what follows a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support import tiny_models
from support.tiny_quant import BF16

CASE = "deepseek_v3"
NUM_LAYERS = 2
DRAFT = f"model.layers.{NUM_LAYERS}"  # the prefix of the head's tensors


def hf_config(**changes: Any) -> dict[str, Any]:
    return tiny_models.hf_config(CASE) | {"num_hidden_layers": NUM_LAYERS} | changes


def make_tensors(share: float | None = None) -> Mapping[str, np.ndarray]:
    """share: of what layers add, where the head's guesses are to be right sometimes; None: random
    weights as they come.
    """
    stored = tiny_models.make_tensors(CASE)
    last = tiny_models.hf_config(CASE)["num_hidden_layers"]
    tensors = {}
    for name, array in stored.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        if layer == last:
            tensors[name.replace(f"layers.{last}.", f"layers.{NUM_LAYERS}.")] = array
        elif layer < NUM_LAYERS:
            tensors[name] = array
    if share is None:
        return tensors
    for name, array in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (array.astype(np.float32) * share).astype(BF16)
    hidden = tensors["model.norm.weight"].shape[0]
    tensors[f"{DRAFT}.eh_proj.weight"] = np.eye(hidden, 2 * hidden).astype(BF16)
    tensors[f"{DRAFT}.enorm.weight"] = np.ones(hidden, BF16)
    tensors[f"{DRAFT}.shared_head.norm.weight"] = tensors["model.norm.weight"]
    return tensors


def write_checkpoint(directory: Path, share: float) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config()))
    tiny_models.write_safetensors(directory / "model.safetensors", make_tensors(share))
    return directory
