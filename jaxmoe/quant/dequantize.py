"""The values of weights as they are held, in numpy: for leaves that no format can hold as they are
cut, and for the error of a conversion. One multiplication by the scale, in float32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxmoe.quant.formats import FORMATS, SCALE_BLOCK, ZERO_MASK, WeightFormat

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_OF_NIBBLE = {
    "int4": np.arange(16, dtype=np.float32) - 8,
    "uint4": np.arange(16, dtype=np.float32),
    "mxfp4": np.concatenate([_E2M1, -_E2M1]),
    "nvfp4": np.concatenate([_E2M1, -_E2M1]),
}


def dequantize(
    weight_format: WeightFormat, data: np.ndarray, scale: np.ndarray | None
) -> np.ndarray:
    """Float32 `[N, K]` of values and scales as formats.py lays them out."""
    if scale is None:
        return np.asarray(data, np.float32)
    if FORMATS[weight_format].bits == 4:
        values = _nibbles(data, _OF_NIBBLE[weight_format.partition("_")[0]])
    else:
        values = data.astype(np.float32)
    n, k = values.shape
    if weight_format == "nvfp4":
        scale, factor = nvfp4_scales(scale)
        groups = values.reshape(n, -1, 16) * scale.astype(np.float32)[..., None]  # exact
        return groups.reshape(n, k) * factor[:, None]
    if weight_format in ("uint4_g32", "uint4_g128"):
        groups = values.reshape(n, -1, FORMATS[weight_format].group_cols)
        scale, zero = uint4_scales(scale)
        return ((groups - zero[..., None]) * scale[..., None]).reshape(n, k)
    if scale.dtype == np.uint8:
        scale = scale.view(ml_dtypes.float8_e8m0fnu)
    scale = scale.astype(np.float32)
    if weight_format == "fp8_block":
        rows = scale.repeat(SCALE_BLOCK, axis=0)[:n]
        return values * rows.repeat(SCALE_BLOCK, axis=1)[:, :k]
    if weight_format == "fp8_channel":
        return values * scale
    groups = values.reshape(n, -1, FORMATS[weight_format].group_cols)
    return (groups * scale[..., None]).reshape(n, k)


def uint4_scales(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points, float32, of `words` of uint4_g32 or uint4_g128."""
    scale = (words & np.uint32(~ZERO_MASK & 0xFFFFFFFF)).view(np.float32)
    return scale, (words & np.uint32(ZERO_MASK)).astype(np.float32)


def nvfp4_scales(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 scales `[..., N, K/16]` and rows' factors, float32 `[..., N]`."""
    factor = np.ascontiguousarray(scale[..., -4:]).view(np.float32)[..., 0]
    return scale[..., :-4].view(ml_dtypes.float8_e4m3fn), factor


def _nibbles(data: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`[N, K/2]` bytes to `[N, K]`: the low nibble is the first."""
    pairs = np.stack([values[data & 15], values[data >> 4]], axis=-1)
    return pairs.reshape(len(data), -1)
