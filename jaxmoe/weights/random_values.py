"""Random weights fast: one block of normal values, copied to where it is needed from random starts.

Good for running shapes and measuring speed, where weights must be of the right format and keep
activations finite; useless for statistics (values repeat). Scales are chosen so that a linear map
about keeps the variance of its input.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxmoe.quant.formats import FORMATS, LARGEST_ZERO, WeightFormat, format_of
from jaxmoe.weights.param_spec import ParamKind, ParamSpec

_BLOCK = 4_194_301  # values; prime, so that no row length divides it and rows differ
_FP8_STD = 16.0  # E4M3 reaches 448: 28 standard deviations, and small values keep their precision
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
# Root mean square of what random codes of a format stand for: FP8 codes are drawn from a normal
# distribution, those of 4 bits all alike.
_CODE_RMS = {
    "fp8": _FP8_STD,
    "mxfp8": _FP8_STD,
    "int4": 4.64,
    "uint4": 4.64,
    "mxfp4": 2.93,
    "nvfp4": 2.93,
}
_MIDDLE_ZERO = LARGEST_ZERO // 2
_SEVENS = 0x77777777  # eight stored zero points, the middle one or next to it
_BYTES = np.dtype(np.uint8)


class RandomValues:
    """Deterministic in `seed` and the tensor's name; may be used from many threads."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._normal = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32)
        self._blocks: dict[tuple[np.dtype, float], np.ndarray] = {}
        self._lock = threading.Lock()

    def fill_weights(self, out: np.ndarray, name: str, fan_in: int, first: int = 0) -> None:
        """Fills a linear map's values, from value `first` of the array on; those of formats with
        scales want `scales` too. Integers are packed 4-bit values.
        """
        if out.dtype.kind in "iu":
            first *= out.itemsize
            self._fill(out.view(_BYTES), name, 0.0, first)
            return
        self._fill(out, name, _FP8_STD if out.dtype == _FP8 else fan_in**-0.5, first)

    def scales(
        self,
        weight_format: WeightFormat,
        shape: tuple[int, ...],
        name: str,
        fan_in: int,
        dtype: np.dtype,
    ) -> np.ndarray:
        """Scales that bring `fill_weights`' codes to the wanted size, in the dtype they are held
        or stored in; what goes with them there (zero points, factors of all) too.
        """
        if dtype == np.int32:
            return np.full(shape, _SEVENS, dtype)
        is_factor = weight_format == "nvfp4" and dtype == np.float32
        if is_factor:
            return np.ones(shape, dtype)
        rms = _CODE_RMS[weight_format.partition("_")[0]]
        scales = self._generator(name).uniform(0.8, 1.2, shape) * (fan_in**-0.5 / rms)
        if dtype == np.uint32:
            return scales.astype(np.float16).astype(np.float32).view(np.uint32) | _MIDDLE_ZERO
        if weight_format == "nvfp4":
            codes = scales.astype(_FP8)
            if dtype == _FP8:
                return codes
            codes = codes.view(np.uint8)
            ones = np.ones((*shape[:-1], 1), np.float32).view(np.uint8)
            codes[..., -ones.shape[-1] :] = ones
            return codes
        if FORMATS[weight_format].scale_dtype == "uint8":
            return (np.rint(np.log2(scales)) + 127).astype(np.uint8).view(dtype)
        return scales.astype(np.float32).astype(dtype)

    def fill(
        self,
        out: np.ndarray,
        name: str,
        kind: ParamKind,
        fan_in: int,
        weight_format: WeightFormat | None = None,
    ) -> None:
        """Fills a tensor as its kind wants it; scales as their `weight_format` does."""
        if kind in ("matrix", "head_map"):
            self.fill_weights(out, name, fan_in)
        elif kind == "scale_inv":
            assert weight_format is not None
            out[...] = self.scales(weight_format, out.shape, name, fan_in, out.dtype)
        elif kind == "embedding":
            self._fill(out, name, 0.5)
        elif kind == "norm":
            out[...] = (1 + 0.1 * self._generator(name).standard_normal(out.shape)).astype(
                out.dtype
            )
        elif kind == "expert_table":
            # Of the first experts only: how many there are is not in the table.
            rows, per_token = out.shape
            out[...] = (np.arange(rows)[:, None] + np.arange(per_token)) % per_token
        elif kind == "conv":
            self._fill(out, name, 0.5)  # of about four tokens
        else:  # bias, router_bias, norm_offset
            out[...] = (0.01 * self._generator(name).standard_normal(out.shape)).astype(out.dtype)

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng((self._seed, zlib.crc32(name.encode())))

    def _fill(self, out: np.ndarray, name: str, std: float, first: int = 0) -> None:
        block = self._block(out.dtype, std)
        flat = out.reshape(-1).view(np.uint8)  # bytes: copying them needs no float8 loops
        assert np.shares_memory(flat, out) or not out.size, "a copy would be filled in vain"
        item = out.dtype.itemsize
        start = (zlib.crc32(name.encode()) + first) % _BLOCK * item
        done = 0
        while done < len(flat):
            piece = block[start : start + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done, start = done + len(piece), 0

    def _block(self, dtype: np.dtype, std: float) -> np.ndarray:
        """The bytes of the normal block, scaled and rounded; of bytes, any."""
        with self._lock:
            if dtype == _BYTES and (dtype, std) not in self._blocks:
                generator = np.random.default_rng((self._seed, 1))
                self._blocks[dtype, std] = generator.integers(0, 256, _BLOCK, np.uint8)
            if (dtype, std) not in self._blocks:
                block = (self._normal * np.float32(std)).astype(dtype)
                self._blocks[dtype, std] = block.view(np.uint8)
            return self._blocks[dtype, std]


def fan_in_of(path: str, spec: ParamSpec, specs: Mapping[str, ParamSpec]) -> int:
    """Inputs of the linear map a leaf belongs to; scales take their weight's."""
    if spec.kind == "scale_inv":
        spec = specs[path.removesuffix("scale_inv") + "data"]
    packed = 2 if spec.dtype == "uint8" else 1
    return spec.shape[-1] * packed


def format_at(path: str, spec: ParamSpec, specs: Mapping[str, ParamSpec]) -> WeightFormat | None:
    """The format of the weight whose scales a leaf holds; None for other leaves."""
    if spec.kind != "scale_inv":
        return None
    data = specs[path.removesuffix("scale_inv") + "data"]
    return format_of(data.dtype, data.shape, spec.dtype, spec.shape)
