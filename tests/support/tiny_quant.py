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
F16 = np.dtype(np.float16)
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


def int4(group: int) -> Callable[[np.ndarray], Tensors]:
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


def _words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Codes `[..., 8 W]` to int32 `[..., W]`: bits 4i hold the one at place order[i] of eight."""
    eights = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 8)
    packed = np.zeros(eights.shape[:-1], np.uint32)
    for i, place in enumerate(order):
        packed |= eights[..., place] << np.uint32(4 * i)
    return packed.view(np.int32)


def _from_words(words: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    eights = np.empty((*words.shape, 8), np.uint8)
    for i, place in enumerate(order):
        eights[..., place] = words.view(np.uint32) >> np.uint32(4 * i) & np.uint32(15)
    return eights.reshape(*words.shape[:-1], -1)


_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def uint4_codes(
    w: np.ndarray,
    group: int,
    *,
    symmetric: bool,
    least_zero: int = 0,
    scale_dtype: np.dtype = F16,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[N, K]`, zero points and scales `[N, K/group]`: (code - zero) * scale."""
    n, k = w.shape
    groups = w.reshape(n, k // group, group)
    if symmetric:
        scale = (np.abs(groups).max(axis=-1) / 7.5).astype(scale_dtype)
        zero = np.full(scale.shape, 8, np.int64)
    else:
        low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
        scale = ((high - low) / 15).astype(scale_dtype)
        zero = np.rint(-low / scale.astype(np.float32)).astype(np.int64)
        zero = np.clip(zero, least_zero, 15 + least_zero)
    codes = np.rint(groups / scale.astype(np.float32)[..., None]) + zero[..., None]
    return np.clip(codes, 0, 15).astype(np.uint8).reshape(n, k), zero, scale


def awq(group: int) -> Callable[[np.ndarray], Tensors]:
    """Inputs first, outputs packed."""

    def make(w: np.ndarray) -> Tensors:
        codes, zero, scale = uint4_codes(w, group, symmetric=False)
        return {
            ".qweight": _words(np.ascontiguousarray(codes.T), _AWQ_ORDER),
            ".qzeros": _words(np.ascontiguousarray(zero.T), _AWQ_ORDER),
            ".scales": np.ascontiguousarray(scale.T),
        }

    return make


def gptq(group: int, *, symmetric: bool, v2: bool = False) -> Callable[[np.ndarray], Tensors]:
    """Inputs packed, outputs last; zero points are stored less one, but in the second version."""

    def make(w: np.ndarray) -> Tensors:
        less = 0 if v2 else 1
        codes, zero, scale = uint4_codes(w, group, symmetric=symmetric, least_zero=less)
        return {
            ".qweight": np.ascontiguousarray(_words(codes).T),
            ".qzeros": _words(np.ascontiguousarray(zero.T) - less),
            ".scales": np.ascontiguousarray(scale.T),
            ".g_idx": (np.arange(w.shape[1]) // group).astype(np.int32),
        }

    return make


def packed_zeros(group: int) -> Callable[[np.ndarray], Tensors]:
    """compressed-tensors' INT4 with zero points, these packed along outputs; bfloat16 scales."""

    def make(w: np.ndarray) -> Tensors:
        codes, zero, scale = uint4_codes(w, group, symmetric=False, scale_dtype=BF16)
        padded = np.zeros((-(-len(zero) // 8) * 8, zero.shape[1]), np.int64)
        padded[: len(zero)] = zero
        return {
            ".weight_packed": _words(codes),
            ".weight_scale": scale,
            ".weight_zero_point": np.ascontiguousarray(_words(np.ascontiguousarray(padded.T)).T),
            ".weight_shape": np.array(w.shape, np.int32),
        }

    return make


def _nvfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes `[N, K/2]`, E4M3 scales `[N, K/16]` and the factor that both are multiplied by."""
    n, k = w.shape
    groups = w.reshape(n, k // 16, 16)
    factor = np.float32(np.abs(w).max() / (6 * _FP8_MAX))
    scale = (np.abs(groups).max(axis=-1) / 6 / factor).astype(FP8)
    wide = scale.astype(np.float32) * factor
    codes = _fp4_codes(groups / wide[..., None]).reshape(n, k)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale, factor


def nvfp4_packed(w: np.ndarray) -> Tensors:
    """compressed-tensors: what both are divided by is stored."""
    data, scale, factor = _nvfp4(w)
    return {
        ".weight_packed": data,
        ".weight_scale": scale,
        ".weight_global_scale": np.array([1 / factor], np.float32),
        ".input_global_scale": np.array([64.0], np.float32),
    }


def nvfp4_modelopt(w: np.ndarray) -> Tensors:
    data, scale, factor = _nvfp4(w)
    return {
        ".weight": data,
        ".weight_scale": scale,
        ".weight_scale_2": np.array(factor, np.float32),
        ".input_scale": np.array(1 / 64, np.float32),
    }


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
        self.is_given = quant is not None
        self.has_rounded_cache = bool(quant and quant.get("kv_cache_scheme"))
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
        elif method == "awq":
            entries = quant["modules_to_not_convert"]
            parts = (re.escape(entry.removesuffix(".")) for entry in entries)
            self._ignored = ["lm_head", *(rf"re:(.*\.)?{part}(\..*)?$" for part in parts)]
            self._make = awq(quant["group_size"])
        elif method == "gptq":
            kept = (key[2:] for key in quant["dynamic"] if key.startswith("-:"))
            self._ignored = ["lm_head", *("re:" + pattern for pattern in kept)]
            v2 = quant.get("checkpoint_format") == "gptq_v2"
            self._make = gptq(quant["group_size"], symmetric=quant["sym"], v2=v2)
        elif method == "modelopt":
            self._ignored = ["re:" + entry.replace("*", ".*") + "$" for entry in quant["ignore"]]
            self._make = nvfp4_modelopt
        elif quant["format"] == "nvfp4-pack-quantized":
            self._ignored = quant["ignore"]
            self._make = nvfp4_packed
        else:
            weights = quant["config_groups"]["group_0"]["weights"]
            self._ignored = quant["ignore"]
            make = int4 if weights["symmetric"] else packed_zeros
            self._make = {
                ("float", 8): _fp8_channel,
                ("float", 4): _mxfp4,
                ("int", 4): make(weights["group_size"] or 1),
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


def _dequantize_uint4(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, is_gptq: bool
) -> np.ndarray:
    """Float32 `[N, K]` of AWQ's or GPTQ's (first version's) tensors."""
    if is_gptq:
        codes = _from_words(np.ascontiguousarray(qweight.T)).T
        zeros = _from_words(qzeros).astype(np.int64) + 1
    else:
        codes, zeros = _from_words(qweight, _AWQ_ORDER), _from_words(qzeros, _AWQ_ORDER)
    group = len(codes) // len(scales)
    differences = codes.astype(np.float32) - zeros.astype(np.float32).repeat(group, axis=0)
    return np.ascontiguousarray((differences * scales.astype(np.float32).repeat(group, axis=0)).T)


_BESIDE = (
    *("_scale_inv", ".weight_scale", ".scale", "_scales", ".weight_scale_2", ".weight_shape"),
    *(".weight_global_scale", ".input_scale", ".input_global_scale"),
    *(".qzeros", ".scales", ".g_idx", ".weight_zero_point", ".k_scale", ".v_scale"),
)


def dequantize(stored: Mapping[str, np.ndarray]) -> Tensors:
    """A checkpoint's tensors with all quantized ones as the float32 weights they stand for."""
    plain: Tensors = {}
    for name, array in stored.items():
        if name.endswith(_BESIDE):
            continue
        base = re.sub(r"(\.weight(_packed)?|_blocks)$", "", name)
        scale = next(
            (
                stored[base + s]
                for s in (".weight_scale_inv", ".weight_scale", ".scale")
                if base + s in stored
            ),
            None,
        )
        if name.endswith(".qweight"):
            base = name.removesuffix(".qweight")
            plain[base + ".weight"] = _dequantize_uint4(
                array, stored[base + ".qzeros"], stored[base + ".scales"], base + ".g_idx" in stored
            )
        elif base + ".weight_global_scale" in stored or base + ".weight_scale_2" in stored:
            assert scale is not None
            factor = stored.get(base + ".weight_scale_2")
            if factor is None:
                factor = 1 / stored[base + ".weight_global_scale"]
            values = _fp4_values(_nibbles(array)).reshape(*scale.shape, 16)
            values = values * scale.astype(np.float32)[..., None] * factor.reshape(1, 1, 1)
            plain[base + ".weight"] = values.reshape(len(array), -1)
        elif name.endswith("_blocks"):
            values = _fp4_values(_nibbles(array)) * _two_to_the(stored[base + "_scales"])[..., None]
            rows = values.reshape(*array.shape[:2], -1)
            plain[base] = np.ascontiguousarray(rows.transpose(0, 2, 1))  # inputs first
        elif name.endswith(".weight_packed"):
            assert scale is not None
            n, groups = scale.shape
            if array.dtype == np.int32:
                words = array.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))
                codes = (words & 15).astype(np.float32).reshape(n, groups, -1)
                zeros: Any = 8
                if (packed := stored.get(base + ".weight_zero_point")) is not None:
                    zeros = _from_words(np.ascontiguousarray(packed.T)).T[:n, :, None]
                    zeros = zeros.astype(np.float32)
                values = (codes - zeros) * scale.astype(np.float32)[..., None]
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
        else:
            plain[name] = array
    return plain
