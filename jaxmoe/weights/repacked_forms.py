"""Forms of 4-bit values whose tensors are not laid out as they are held: AWQ, GPTQ, INT4 of
compressed-tensors with zero points or groups of other sizes, NVFP4.

AWQ and GPTQ store inputs first, eight values to a word along outputs or inputs, and zero points
packed along outputs; both are put in the order of uint4_g32 or uint4_g128, rows of outputs.
compressed-tensors has that order already. NVFP4 has one more factor a tensor, which goes behind the
scales of every row. No value is rounded: codes and zero points keep their bits, float16 scales
widen to float32, and groups of other sizes than 32 and 128 repeat their scales.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.quant.formats import FORMATS, WeightFormat
from jaxmoe.weights.name_map import StoredTensor
from jaxmoe.weights.stored_form import StoredForm

_WORD = 8  # values in an int32
# Place, among eight outputs, of the values in bits 0-3, 8-11, ... of an AWQ word, and in 4-7, ...
_AWQ_LOW, _AWQ_HIGH = [0, 4, 1, 5], [2, 6, 3, 7]


def held_uint4(group: int) -> WeightFormat | None:
    """The format for groups of so many inputs; None: no whole part of them has one."""
    if group > 0 and group % 128 == 0:
        return "uint4_g128"
    return "uint4_g32" if group > 0 and group % 32 == 0 else None


@dataclasses.dataclass(frozen=True)
class _Uint4Form(StoredForm):
    """group: inputs that share a scale, as stored."""

    group: int = 0
    zero_offset: int = 0  # what a zero point is beyond its stored value

    @property
    def is_repacked(self) -> bool:
        return True

    def scale_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(self.scale_name(name), self._groups(held), self.scale_dtypes)

    def scale_tensors(self, name: str, held: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        groups, n = self._groups(held)
        zeros = self.scale_name(name).removesuffix(".scales") + ".qzeros"
        return self.scale_tensor(name, held), StoredTensor(zeros, (groups, n // _WORD), ("I32",))

    def _groups(self, held: tuple[int, ...]) -> tuple[int, int]:
        n, groups = held
        return groups * FORMATS[self.format].group_cols // self.group, n

    def _words(self, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Words of a scale and a zero point, of `[N, K/group]` each."""
        # Exact: float16 and bfloat16 leave the bits of a zero point free.
        words = scales.astype(np.float32).view(np.uint32) | zeros.astype(np.uint32)
        repeat = self.group // FORMATS[self.format].group_cols
        return np.ascontiguousarray(words.repeat(repeat, axis=1))


@dataclasses.dataclass(frozen=True)
class AwqForm(_Uint4Form):
    """qweight `[K, N/8]`, qzeros `[K/group, N/8]`, scales `[K/group, N]`."""

    def weight_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        n, columns = held
        return StoredTensor(self.weight_name(name), (2 * columns, n // _WORD), ("I32",))

    def inputs_of(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def hold_weight(self, stored: np.ndarray) -> np.ndarray:
        codes = _awq_codes(stored)
        return np.ascontiguousarray((codes[0::2] | codes[1::2] << 4).T)

    def hold_scale(self, stored: np.ndarray, *beside: np.ndarray) -> np.ndarray:
        (zeros,) = beside
        return self._words(stored.T, _awq_codes(zeros).T)


def _awq_codes(words: np.ndarray) -> np.ndarray:
    """int32 `[R, N/8]` to codes `[R, N]`."""
    pairs = words.view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((*words.shape, _WORD), np.uint8)
    codes[..., _AWQ_LOW] = pairs & 15
    codes[..., _AWQ_HIGH] = pairs >> 4
    return codes.reshape(len(words), -1)


@dataclasses.dataclass(frozen=True)
class GptqForm(_Uint4Form):
    """qweight `[K/8, N]`, qzeros `[K/group, N/8]`, scales `[K/group, N]` and, if has_order, g_idx
    `[K]`: each input's group.
    """

    has_order: bool = False

    def weight_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        n, columns = held
        return StoredTensor(self.weight_name(name), (2 * columns // _WORD, n), ("I32",))

    def inputs_of(self, shape: tuple[int, ...]) -> int:
        return shape[0] * _WORD

    def hold_weight(self, stored: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(stored.T).view(np.uint8)

    def scale_tensors(self, name: str, held: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        tensors = super().scale_tensors(name, held)
        if not self.has_order:
            return tensors
        order = self.scale_name(name).removesuffix(".scales") + ".g_idx"
        inputs = held[1] * FORMATS[self.format].group_cols
        return *tensors, StoredTensor(order, (inputs,), ("I32",))

    def hold_scale(self, stored: np.ndarray, *beside: np.ndarray) -> np.ndarray:
        zeros = beside[0]
        if self.has_order:
            inputs = beside[1]
            if not np.array_equal(inputs, np.arange(len(inputs)) // self.group):
                raise CheckpointError(
                    "GPTQ's g_idx is out of order: inputs were quantized in the order of their "
                    "activations (desc_act), which is not supported; give a checkpoint made with "
                    "desc_act=false"
                )
        return self._words(stored.T, (_codes(zeros) + self.zero_offset).T)


def _codes(words: np.ndarray) -> np.ndarray:
    """int32 `[R, W]` to codes `[R, 8 W]`."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(words), -1)


@dataclasses.dataclass(frozen=True)
class PackedUint4Form(_Uint4Form):
    """compressed-tensors: weight_packed `[N, K/8]`, weight_scale `[N, K/group]` and, if has_zeros,
    weight_zero_point `[ceil(N/8), K/group]`, packed along outputs; without, it is 8.
    """

    has_zeros: bool = False

    @property
    def is_repacked(self) -> bool:
        return False  # the values are not

    def weight_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        return StoredForm.weight_tensor(self, name, held)

    def _groups(self, held: tuple[int, ...]) -> tuple[int, int]:
        n, groups = held
        return n, groups * FORMATS[self.format].group_cols // self.group

    def scale_tensors(self, name: str, held: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        scale = self.scale_tensor(name, held)
        if not self.has_zeros:
            return (scale,)
        n, groups = scale.shape
        zeros = name.removesuffix(".weight") + ".weight_zero_point"
        return scale, StoredTensor(zeros, (-(-n // _WORD), groups), ("I32",))

    def hold_scale(self, stored: np.ndarray, *beside: np.ndarray) -> np.ndarray:
        zeros = np.full(stored.shape, 8, np.uint8)
        if self.has_zeros:
            zeros = _codes(np.ascontiguousarray(beside[0].T)).T[: len(stored)]
        return self._words(stored, zeros)


@dataclasses.dataclass(frozen=True)
class Nvfp4Form(StoredForm):
    """Values `[N, K/2]` and E4M3 scales `[N, K/16]` as they are held, and a factor of them all.

    factor: what stands in the place of the name's ".weight". divides: whether it is divided by.
    """

    factor: str = ""
    divides: bool = False
    factor_shape: tuple[int, ...] = ()

    def scale_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        n, columns = held
        shape = n, columns - FORMATS[self.format].tail_cols
        return StoredTensor(self.scale_name(name), shape, self.scale_dtypes)

    def scale_tensors(self, name: str, held: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        factor = name.removesuffix(".weight") + self.factor
        return self.scale_tensor(name, held), StoredTensor(factor, self.factor_shape, ("F32",))

    def hold_scale(self, stored: np.ndarray, *beside: np.ndarray) -> np.ndarray:
        value = np.float32(beside[0].reshape(-1)[0])
        if not value > 0 or not math.isfinite(float(value)):
            raise CheckpointError(f"the factor of NVFP4 values is {value}; wanted one above 0")
        factor = np.float32(1) / value if self.divides else value
        tail = np.full((len(stored), 1), factor, np.float32).view(np.uint8)
        scales = stored.view(ml_dtypes.float8_e4m3fn).view(np.uint8)
        return np.concatenate([scales, tail], axis=1)
