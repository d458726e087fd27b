"""How a checkpoint stores a linear map: the tensors it has, and how they become what is held.

A form belongs to a format (quant/formats.py), which several forms may share: FP8 blocks with
float32, bfloat16 or e8m0 scales, 4-bit values in int32 words or in bytes. Nothing is rounded on the
way: values keep their bits, scales are widened at most.

Which checkpoint has which form, and what its tensors are called, is the families' to say
(models/stored_forms.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.common.errors import CheckpointError
from jaxmoe.quant.formats import FORMATS, WeightFormat
from jaxmoe.weights.name_map import StoredTensor

_PLAIN = ".weight"
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


class FormError(CheckpointError):
    """A weight is stored in a form that is none of ours: nothing config.json says could help."""


class HasShape(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Stored(NamedTuple):
    """`HasShape` without a file behind it."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """The tensors of a linear map `[N, K]`, by the name its weight has where it is not quantized.

    weight, scale: what stands in the place of that name's ".weight", or after it where it has none.
    weight_dtype: a safetensors word. scale_dtypes: the words that will do, the usual one first.
    flat_scale: scales of rows are stored as `[N]`. beside: more tensors that such a map may have,
    which say nothing new (its sizes); they are not read.
    """

    format: WeightFormat
    weight_dtype: str
    weight: str = _PLAIN
    scale: str | None = None
    scale_dtypes: tuple[str, ...] = ()
    flat_scale: bool = False
    beside: tuple[str, ...] = ()

    def weight_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        """The tensor of values that are held in the shape `held` (`data_shape`)."""
        *rows, columns = held
        if self.weight_dtype == "I32":
            columns //= 4
        return StoredTensor(self.weight_name(name), (*rows, columns), (self.weight_dtype,))

    def scale_tensor(self, name: str, held: tuple[int, ...]) -> StoredTensor:
        """The tensor of scales that are held in the shape `held` (`scale_shape`)."""
        shape = held[:-1] if self.flat_scale else held
        return StoredTensor(self.scale_name(name), shape, self.scale_dtypes)

    def scale_name(self, name: str) -> str:
        assert self.scale is not None, self
        return _base(name) + self.scale

    def weight_name(self, name: str) -> str:
        return name if self.weight == _PLAIN else _base(name) + self.weight

    @property
    def is_repacked(self) -> bool:
        """Whether values are held in another order than they are stored in."""
        return False

    def inputs_of(self, shape: tuple[int, ...]) -> int:
        """K of a repacked weight that is stored in this shape."""
        raise NotImplementedError(self)

    def scale_tensors(self, name: str, held: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        """The tensors that scales held in the shape `held` are made of; the first has scales."""
        return (self.scale_tensor(name, held),)

    def others(self, name: str) -> tuple[str, ...]:
        """The tensors that go with the weight and are not read."""
        return tuple(_base(name) + suffix for suffix in self.beside)

    def hold_weight(self, stored: np.ndarray) -> np.ndarray:
        """The values as they are held: the same bytes, a view."""
        return stored.view(np.dtype(jnp.dtype(FORMATS[self.format].data_dtype)))

    def hold_scale(self, stored: np.ndarray, *beside: np.ndarray) -> np.ndarray:
        """The scales as they are held, in the format's dtype; of `scale_tensors`, in order.

        Raises: CheckpointError where they say what the format does not hold.
        """
        assert not beside, self
        if self.flat_scale:
            stored = stored[..., None]
        return widen_scale(self.format, stored)


def widen_scale(weight_format: WeightFormat, stored: np.ndarray) -> np.ndarray:
    """Stored scales in the dtype they are held in; exact."""
    held = FORMATS[weight_format].scale_dtype
    if held == "uint8":
        return stored.view(np.uint8)
    if stored.dtype == np.uint8:
        stored = stored.view(_E8M0)
    return np.asarray(stored, np.dtype(jnp.dtype(held)))


def _base(name: str) -> str:
    return name.removesuffix(_PLAIN)


class Forms:
    """The form of the linear map (or embedding) at a module path, and as a `Formats` how it is
    held: another format only where a map is cut in a way its stored one does not survive.
    """

    def __init__(
        self,
        stored: Callable[[str], StoredForm],
        held: Callable[[str, WeightFormat], WeightFormat] = lambda path, stored: stored,
    ) -> None:
        self.stored = stored
        self._held = held

    def __call__(self, path: str) -> WeightFormat:
        return self._held(path, self.stored(path).format)
