"""The formats of stored linear maps: element types, scales, shapes. xla_ffi/kernels/formats.h says
the same in C++.

A map is `data`, row-major, outputs first, and in all but the plain formats `scale`, whose elements
multiply groups of weights:

  bf16, f32            [N, K]
  fp8_block            E4M3 [N, K];    float32 [ceil(N/128), ceil(K/128)]
  fp8_channel          E4M3 [N, K];    float32 [N, 1]
  int4_g32, int4_g128  uint8 [N, K/2]; bfloat16 [N, K/32] or [N, K/128]: (nibble - 8) * scale
  mxfp4                uint8 [N, K/2]; uint8 [N, K/32]: E2M1 code times 2^(scale - 127)
  mxfp8                E4M3 [N, K];    uint8 [N, K/32]: times 2^(scale - 127)
  uint4_g32, uint4_g128  uint8 [N, K/2]; uint32 [N, K/32] or [N, K/128]: (nibble - zero) * scale,
                       the zero point, 0 to 16, in a word's low five bits, which a float32 scale of
                       at most 11 significant bits leaves free
  nvfp4                uint8 [N, K/2]; uint8 [N, K/16 + 4]: E2M1 code times E4M3 scale times the
                       row's factor, float32, in its last four bytes

Element 2j of a row of nibbles is the low half of byte j. Scales of one exponent (e8m0) are bytes;
255 would be NaN and is refused where weights are loaded. Nothing here computes or knows jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

WeightFormat = Literal[
    "bf16",
    "f32",
    "fp8_block",
    "fp8_channel",
    "int4_g32",
    "int4_g128",
    "mxfp4",
    "mxfp8",
    "uint4_g32",
    "uint4_g128",
    "nvfp4",
]

SCALE_BLOCK = 128  # rows and columns of a block of fp8_block


@dataclasses.dataclass(frozen=True)
class FormatInfo:
    """One format.

    code: its number in C++.
    data_dtype, scale_dtype: names as jnp.dtype takes them; None: no scales.
    bits: of a weight.
    group_rows, group_cols: rows and columns that share a scale; 0 columns: all of a row.
    whole_groups: whether K must be a multiple of group_cols.
    tail_cols: elements behind the scales of a row: the bytes of its factor.
    """

    code: int
    data_dtype: str
    bits: int
    scale_dtype: str | None = None
    group_rows: int = 1
    group_cols: int = 0
    whole_groups: bool = False
    tail_cols: int = 0


FORMATS: Mapping[WeightFormat, FormatInfo] = {
    "f32": FormatInfo(0, "float32", 32),
    "bf16": FormatInfo(1, "bfloat16", 16),
    "fp8_block": FormatInfo(2, "float8_e4m3fn", 8, "float32", SCALE_BLOCK, SCALE_BLOCK),
    "fp8_channel": FormatInfo(3, "float8_e4m3fn", 8, "float32"),
    "int4_g32": FormatInfo(4, "uint8", 4, "bfloat16", 1, 32, True),
    "int4_g128": FormatInfo(5, "uint8", 4, "bfloat16", 1, 128, True),
    "mxfp4": FormatInfo(6, "uint8", 4, "uint8", 1, 32, True),
    "mxfp8": FormatInfo(7, "float8_e4m3fn", 8, "uint8", 1, 32, True),
    "uint4_g32": FormatInfo(8, "uint8", 4, "uint32", 1, 32, True),
    "uint4_g128": FormatInfo(9, "uint8", 4, "uint32", 1, 128, True),
    "nvfp4": FormatInfo(10, "uint8", 4, "uint8", 1, 16, True, 4),
}
ZERO_MASK = 31  # the zero point's bits of a word of uint4_g32 and uint4_g128
LARGEST_ZERO = 16


def check_columns(weight_format: WeightFormat, k: int) -> None:
    """ValueError where rows of `k` weights do not end at the end of a group."""
    info = FORMATS[weight_format]
    if info.whole_groups and k % info.group_cols:
        raise ValueError(
            f"{weight_format} wants rows of a multiple of {info.group_cols} weights; given {k}"
        )


def data_shape(weight_format: WeightFormat, n: int, k: int) -> tuple[int, int]:
    """Of the stored data of a map `[n, k]`, in elements of its dtype. ValueError as above."""
    check_columns(weight_format, k)
    return n, k // 2 if FORMATS[weight_format].bits == 4 else k


def scale_shape(weight_format: WeightFormat, n: int, k: int) -> tuple[int, int] | None:
    """Of the scales of a map `[n, k]`; None for formats without. ValueError as above."""
    check_columns(weight_format, k)
    info = FORMATS[weight_format]
    if info.scale_dtype is None:
        return None
    columns = -(-k // info.group_cols) if info.group_cols else 1
    return -(-n // info.group_rows), columns + info.tail_cols


def format_of(
    data_dtype: str,
    data_shape_: tuple[int, ...],
    scale_dtype: str | None,
    scale_shape_: tuple[int, ...] | None,
) -> WeightFormat:
    """The format of stored arrays `[..., N, K]` and their scales.

    Types and shapes decide it: where a block and a row would have the same shape (one row of at
    most 128 weights), they are the same thing.

    Raises: ValueError, with what was given and what the data's type could go with.
    """
    lead, (n, columns) = data_shape_[:-2], data_shape_[-2:]
    could = []
    for word, info in FORMATS.items():
        if info.data_dtype != data_dtype:
            continue
        k = columns * 2 if info.bits == 4 else columns
        if info.whole_groups and k % info.group_cols:
            continue
        wanted = scale_shape(word, n, k)
        if info.scale_dtype == scale_dtype and (
            wanted is None if scale_shape_ is None else scale_shape_ == (*lead, *(wanted or ()))
        ):
            return word
        shape = "no scales" if wanted is None else f"{info.scale_dtype} {[*lead, *wanted]}"
        could.append(f"{word}: {shape}")
    given = "without scales" if scale_shape_ is None else f"with {scale_dtype} {[*scale_shape_]}"
    raise ValueError(
        f"weights {data_dtype} {[*data_shape_]} {given}; wanted "
        + ("; or ".join(could) or "a type of " + ", ".join(sorted({*_data_dtypes()})))
    )


def _data_dtypes() -> list[str]:
    return [info.data_dtype for info in FORMATS.values()]
