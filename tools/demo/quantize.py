"""Rounding trained weights to what the checkpoint stores, and back.

Linear weights become float8_e4m3fn with one float32 scale a block of 128 x 128 (`weight_scale_inv`:
multiply to dequantize). Embeddings, norms, router and head stay bfloat16, the router's correction
bias float32, as DeepSeek ships them.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

_BLOCK = 128
_E4M3_MAX = 448.0
_SCALE_SUFFIX = "_scale_inv"


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")


def store_bf16(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor as an unquantized checkpoint would hold it."""
    return {name: _plain(name, data) for name, data in tensors.items()}


def store_fp8(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor as the demo checkpoint holds it, scales next to their weights."""
    stored = {}
    for name, data in tensors.items():
        if _is_linear(name):
            stored[name], stored[name + _SCALE_SUFFIX] = _quantize(data)
        else:
            stored[name] = _plain(name, data)
    return stored


def load(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The exact float32 value of every stored tensor."""
    out = {}
    for name, data in stored.items():
        if name.endswith(_SCALE_SUFFIX):
            continue
        out[name] = data.astype(np.float32)
        if data.dtype == ml_dtypes.float8_e4m3fn:
            out[name] *= _spread(stored[name + _SCALE_SUFFIX], data.shape)
    return out


def _plain(name: str, data: np.ndarray) -> np.ndarray:
    is_bias = name.endswith("e_score_correction_bias")
    return data.astype(np.float32 if is_bias else ml_dtypes.bfloat16)


def _spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    spread = scale.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)
    return spread[: shape[0], : shape[1]]


def _quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[N, K]` to its codes and scales `[ceil(N/128), ceil(K/128)]`; last blocks may be partial."""
    weight = weight.astype(np.float32)
    n, k = weight.shape
    padded = np.pad(np.abs(weight), ((0, -n % _BLOCK), (0, -k % _BLOCK)))
    blocks = padded.reshape(padded.shape[0] // _BLOCK, _BLOCK, padded.shape[1] // _BLOCK, _BLOCK)
    largest = blocks.max(axis=(1, 3))
    scale = np.where(largest > 0, largest / _E4M3_MAX, 1.0).astype(np.float32)
    # The clip undoes a last-bit overshoot of the division, which would round to NaN.
    codes = np.clip(weight / _spread(scale, weight.shape), -_E4M3_MAX, _E4M3_MAX)
    return codes.astype(ml_dtypes.float8_e4m3fn), scale
