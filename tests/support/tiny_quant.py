"""Quantized linear maps as published checkpoints store them, and back, with numpy alone.

Written apart from the loader on purpose: these are what it is held to. Each scheme makes tensors of
float32 `[N, K]` by the suffixes they are published under; `dequantize` turns a checkpoint's tensors
into the exact float32 weights they stand for, under the names an unquantized one has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
F32 = np.dtype(np.float32)
_BLOCK = 128
_FP8_MAX = 448.0
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
Tensors = dict[str, np.ndarray]


def fp8_block(w: np.ndarray, scale_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 data and `scale_inv [ceil(N/128), ceil(K/128)]`; e8m0 scales are rounded up."""
    n, k = w.shape
    blocks_n, blocks_k = -(-n // _BLOCK), -(-k // _BLOCK)
    padded = np.zeros((blocks_n * _BLOCK, blocks_k * _BLOCK), np.float32)
    padded[:n, :k] = w
    tiles = padded.reshape(blocks_n, _BLOCK, blocks_k, _BLOCK)
    scale = np.abs(tiles).max(axis=(1, 3)) / _FP8_MAX
    if scale_dtype == E8M0:
        scale = np.exp2(np.ceil(np.log2(scale)))
    scale = scale.astype(scale_dtype)
    scaled = tiles / scale.astype(np.float32)[:, None, :, None]
    data = np.clip(scaled, -_FP8_MAX, _FP8_MAX).reshape(padded.shape)[:n, :k].astype(FP8)
    return data, scale


def dequantize_block(data: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """The exact float32 value of block-scaled FP8; partial blocks at the edges are ordinary."""
    n, k = data.shape
    scale = scale_inv.astype(np.float32).repeat(_BLOCK, axis=0)[:n].repeat(_BLOCK, axis=1)[:, :k]
    return data.astype(np.float32) * scale


def _fp8_channel(w: np.ndarray) -> Tensors:
    scale = (np.abs(w).max(axis=1, keepdims=True) / _FP8_MAX).astype(BF16)
    data = np.clip(w / scale.astype(np.float32), -_FP8_MAX, _FP8_MAX).astype(FP8)
    return {".weight": data, ".weight_scale": scale}


def _int4(group: int) -> Callable[[np.ndarray], Tensors]:
    def make(w: np.ndarray) -> Tensors:
        n, k = w.shape
        groups = w.reshape(n, k // group, group)
        scale = (np.abs(groups).max(axis=-1) / 7.5).astype(BF16)
        codes = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -8, 7)
        words = (codes.reshape(n, k // 8, 8) + 8).astype(np.uint32)
        packed = np.zeros((n, k // 8), np.uint32)
        for i in range(8):
            packed |= words[..., i] << np.uint32(4 * i)
        shape = np.array([n, k], np.int32)
        tensors = {".weight_packed": packed.view(np.int32), ".weight_scale": scale}
        return tensors | {".weight_shape": shape}

    return make


def _shared_exponents(w: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of 32 scaled by a power of two each, `[N, K/32, 32]`, and its codes `[N, K/32]`.
    largest: exponent of the largest value of the element type.
    """
    n, k = w.shape
    groups = w.reshape(n, k // 32, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(axis=-1))) - largest
    return groups / np.exp2(exponent)[..., None], (exponent + 127).astype(np.uint8)


def _fp4_codes(values: np.ndarray) -> np.ndarray:
    nearest = np.abs(np.abs(values)[..., None] - _FP4).argmin(axis=-1).astype(np.uint8)
    return nearest | np.where(np.signbit(values), np.uint8(8), np.uint8(0))


def mxfp4_blocks(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes `[N, K/32, 16]`, the first of two values in the low nibble, and scales `[N, K/32]`."""
    scaled, exponents = _shared_exponents(w, 2)
    codes = _fp4_codes(scaled)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), exponents


def _mxfp4(w: np.ndarray) -> Tensors:
    blocks, exponents = mxfp4_blocks(w)
    return {".weight_packed": blocks.reshape(len(w), -1), ".weight_scale": exponents}


def _deepseek_v4(w: np.ndarray) -> Tensors:
    """What is not a routed expert: FP8 blocks with e8m0 scales under a name of their own."""
    data, scale = fp8_block(w, E8M0)
    return {".weight": data, ".scale": scale}


def _mxfp4_int8(w: np.ndarray) -> Tensors:
    blocks, exponents = mxfp4_blocks(w)
    return {".weight": blocks.reshape(len(w), -1).view(np.int8), ".scale": exponents.view(E8M0)}


def _mxfp8(w: np.ndarray) -> Tensors:
    scaled, exponents = _shared_exponents(w, 8)
    data = np.clip(scaled, -_FP8_MAX, _FP8_MAX).reshape(w.shape).astype(FP8)
    return {".weight": data, ".weight_scale_inv": exponents}


def _fp8(scale_dtype: np.dtype) -> Callable[[np.ndarray], Tensors]:
    def make(w: np.ndarray) -> Tensors:
        data, scale = fp8_block(w, scale_dtype)
        return {".weight": data, ".weight_scale_inv": scale}

    return make


class Scheme:
    """What a config's `quantization_config` does to the linear map of a name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        quant = config.get("quantization_config")
        self._ignored: list[str] = []
        self._make: Callable[[np.ndarray], Tensors] | None = None
        self.is_mxfp4_experts = False
        self._is_v4 = config["model_type"] == "deepseek_v4"
        if quant is None:
            return
        method = quant["quant_method"]
        if method == "fp8":
            is_qwen = config["model_type"].startswith("qwen3")
            self._make = _fp8(BF16 if is_qwen else E8M0 if "scale_fmt" in quant else F32)
        elif method == "mxfp8":
            self._make = _mxfp8
        elif method == "mxfp4":
            self.is_mxfp4_experts = True
        else:
            weights = quant["config_groups"]["group_0"]["weights"]
            self._ignored = quant["ignore"]
            self._make = {
                ("float", 8): _fp8_channel,
                ("float", 4): _mxfp4,
                ("int", 4): _int4(weights["group_size"] or 1),
            }[weights["type"], weights["num_bits"]]

    def tensors(self, name: str, w: np.ndarray) -> Tensors | None:
        """By suffix; None where the map is not quantized."""
        if self._make is None or any(
            re.match(entry[3:], name) if entry.startswith("re:") else entry == name
            for entry in self._ignored
        ):
            return None
        if self._is_v4:
            return _mxfp4_int8(w) if ".experts." in name else _deepseek_v4(w)
        return self._make(w)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Bytes `[..., B]` to codes `[..., 2 B]`, low nibble first."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def _fp4_values(codes: np.ndarray) -> np.ndarray:
    return _FP4[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))


def _two_to_the(exponents: np.ndarray) -> np.ndarray:
    return np.exp2(exponents.astype(np.float32) - 127)


def dequantize(stored: Mapping[str, np.ndarray]) -> Tensors:
    """A checkpoint's tensors with all quantized ones as the float32 weights they stand for."""
    plain: Tensors = {}
    for name, array in stored.items():
        base = re.sub(r"(\.weight(_packed)?|_blocks)$", "", name)
        scale = next(
            (
                stored[base + s]
                for s in (".weight_scale_inv", ".weight_scale", ".scale")
                if base + s in stored
            ),
            None,
        )
        if name.endswith("_blocks"):
            values = _fp4_values(_nibbles(array)) * _two_to_the(stored[base + "_scales"])[..., None]
            rows = values.reshape(*array.shape[:2], -1)
            plain[base] = np.ascontiguousarray(rows.transpose(0, 2, 1))  # inputs first
        elif name.endswith(".weight_packed"):
            assert scale is not None
            n, groups = scale.shape
            if array.dtype == np.int32:
                words = array.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))
                codes = (words & 15).astype(np.float32).reshape(n, groups, -1)
                values = (codes - 8) * scale.astype(np.float32)[..., None]
            else:
                values = _fp4_values(_nibbles(array)).reshape(n, groups, -1)
                values = values * _two_to_the(scale)[..., None]
            plain[base + ".weight"] = values.reshape(n, -1)
        elif array.dtype == np.int8:
            assert scale is not None
            values = _fp4_values(_nibbles(array.view(np.uint8))).reshape(*scale.shape, 32)
            plain[name] = (values * _two_to_the(scale.view(np.uint8))[..., None]).reshape(
                len(array), -1
            )
        elif array.dtype == FP8:
            assert scale is not None
            if scale.dtype == np.uint8:
                groups = array.astype(np.float32).reshape(*scale.shape, 32)
                plain[name] = (groups * _two_to_the(scale)[..., None]).reshape(array.shape)
            elif scale.shape == (len(array), 1):
                plain[name] = array.astype(np.float32) * scale.astype(np.float32)
            else:
                plain[name] = dequantize_block(array, scale)
        elif not name.endswith(
            ("_scale_inv", ".weight_scale", ".scale", "_scales", ".weight_shape")
        ):
            plain[name] = array
    return plain
