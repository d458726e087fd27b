"""What a loader asks of a model family: which stored tensors make up each leaf.

The families' maps themselves (models/*_names.py) are the only place that spells tensor names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from jaxmoe.quant.formats import WeightFormat

if TYPE_CHECKING:
    from jaxmoe.weights.stored_form import StoredForm  # which is made of the tensors below

Matrix = Literal["gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the checkpoint must hold it; `dtypes` are the safetensors names that will do."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Where a leaf comes from.

    transform: takes the stored tensors as numpy arrays, in order and in their stored dtypes
    (ml_dtypes), and
        returns the leaf in its shape and dtype: a copy or a view of its input.
    others: names of tensors that may go with these and are not needed.
    scales_of: the format whose scales the leaf is, where it is stored as it is held.
    """

    tensors: tuple[StoredTensor, ...]
    transform: Callable[..., np.ndarray]
    others: tuple[str, ...] = ()
    scales_of: WeightFormat | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """A tensor that holds a matrix of all experts of a layer, `[E, *slab]`.

    cut: makes one expert's matrix `[N, K]`, as the layer applies it, of its slab: a copy or a view.
    first_row: where the matrix is rows of the slab as they lie there, the first of them; its bytes
        are then read without a cut.
    scale: where their scales lie; a matrix's are made as it is.
    """

    tensor: str
    slab: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]
    scale: PackedExperts | None = None
    first_row: int | None = None


class NameMap(Protocol):
    def tensors_for(self, path: str) -> TensorSource:
        """The source of the leaf at a path of `Description.specs`."""
        ...

    def expert_tensor(self, layer: int, expert: int, which: Matrix) -> str:
        """The weight of one routed expert, gate and up `[F, D]`, down `[D, F]`, by the name it has
        where it is not quantized.
        """
        ...

    def expert_form(self, layer: int) -> StoredForm:
        """How the routed experts of a layer are stored."""
        ...

    def packed_experts(self, layer: int, which: Matrix) -> PackedExperts | None:
        """Where all experts of a layer lie in one tensor; None where each has its own."""
        ...

    def weight_of_scale(self, name: str) -> str | None:
        """The weight whose scales a tensor of that name would be; None where it is no such name."""
        ...

    def ignored(self, name: str) -> bool:
        """Whether a tensor is known and not needed (draft heads of training, derived tables)."""
        ...
