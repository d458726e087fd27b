"""The tiny DeepSeek-V4 as `save_pretrained` of transformers 5.23 writes it: in BF16, under names
that are half its own, with a config of its own spelling. (Seen in such a save.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from support import tiny_models, tiny_quant

_KINDS = {0: "sliding", 4: "compressed_sparse", 128: "heavily_compressed"}
_NAMES = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight"}


def name(shipped: str) -> str:
    if shipped in _NAMES:
        return _NAMES[shipped]
    head = re.fullmatch(r"hc_head_(\w+)", shipped)
    if head:
        return f"model.hc_head.hc_{head[1]}"
    return "model." + shipped.replace(".attn.kv_norm.", ".attn.norm.")


def tensors() -> dict[str, np.ndarray]:
    plain = tiny_quant.dequantize(tiny_models.make_tensors("deepseek_v4"))
    out = {}
    for shipped, array in plain.items():
        if shipped.startswith("mtp."):
            continue
        if array.ndim == 2 and array.dtype != np.int64 and not shipped.endswith(("_fn", ".ape")):
            rounded = array.astype(ml_dtypes.bfloat16)
            assert np.array_equal(rounded.astype(np.float32), array.astype(np.float32)), shipped
            array = rounded
        elif array.dtype != np.int64:
            array = array.astype(np.float32)
        out[name(shipped)] = array
    return out


def config() -> dict[str, Any]:
    shipped: Mapping[str, Any] = tiny_models.hf_config("deepseek_v4")
    gone = ("compress_ratios", "num_hash_layers", "rope_scaling", "quantization_config")
    out = {k: v for k, v in shipped.items() if k not in gone}
    layers, share = shipped["num_hidden_layers"], 0.125
    rope = {k: v for k, v in shipped["rope_scaling"].items() if k != "type"}
    hashed = shipped["num_hash_layers"]
    return out | {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "layer_types": [f"{_KINDS[r]}_attention" for r in shipped["compress_ratios"][:layers]],
        "mlp_layer_types": ["hash_moe" if i < hashed else "moe" for i in range(layers)],
        "partial_rotary_factor": share,
        "rope_parameters": {
            "compress": {
                **rope,
                "attention_factor": 1.0,
                "partial_rotary_factor": share,
                "rope_theta": 160000,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "main": {
                "partial_rotary_factor": share,
                "rope_theta": 10000,
                "rope_type": "default",
            },
        },
        "rope_theta": 10000,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "transformers_version": "5.23.0",
    }


def write(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config()))
    tiny_models.write_safetensors(directory / "model.safetensors", tensors())
    return directory
