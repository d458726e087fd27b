"""The values of weights as they are held, in numpy: for leaves that no format can hold as they are
cut, and for the error of a conversion. One multiplication by the scale, in float32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxmoe.quant.formats import FORMATS, SCALE_BLOCK, WeightFormat

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_OF_NIBBLE = {
    "int4": np.arange(16, dtype=np.float32) - 8,
    "mxfp4": np.concatenate([_E2M1, -_E2M1]),
}


def dequantize(
    weight_format: WeightFormat, data: np.ndarray, scale: np.ndarray | None
) -> np.ndarray:
    """Float32 `[N, K]` of values and scales as formats.py lays them out."""
    if scale is None:
        return np.asarray(data, np.float32)
    if weight_format == "mxfp4":
        values = _nibbles(data, _OF_NIBBLE["mxfp4"])
    elif weight_format in ("int4_g32", "int4_g128"):
        values = _nibbles(data, _OF_NIBBLE["int4"])
    else:
        values = data.astype(np.float32)
    n, k = values.shape
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


def _nibbles(data: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`[N, K/2]` bytes to `[N, K]`: the low nibble is the first."""
    pairs = np.stack([values[data & 15], values[data >> 4]], axis=-1)
    return pairs.reshape(len(data), -1)
