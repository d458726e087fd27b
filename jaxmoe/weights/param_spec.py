"""What a module says about each of its weights, once: random init, loading and placement all read
it.

A module creates its leaves with `new_param(ParamSpec(...))`, normally under `nnx.eval_shape`, so
that describing a model of any size allocates nothing. `describe` then turns the described model
into a flat table of leaves, keyed by dotted paths such as "layers.3.attention.q_b.data", and
`Description.fill` puts arrays in their place.

Routed experts are not here: they live in the host store and never in the module tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.quant.formats import FORMATS, SCALE_BLOCK, WeightFormat

# Says how the linear map (or embedding) at a module path such as "layers.3.attention.q_b" is
# stored. The path "layers.3.mlp.experts" stands for the routed experts of a layer.
Formats = Callable[[str], WeightFormat]

# matrix [N, K], head_map [G, N, K]: linear maps, outputs first, as their format lays them out
# (quant/formats.py); scale_inv: the scales of one of those; embedding [V, D]; norm: RMS-norm
# weights, or norm_offset: what they are beyond 1; bias: of a linear map; router_bias: the router's
# score correction; conv [W, C]: a convolution over W tokens, channel by channel;
# expert_table [V, A]: expert ids, those of a row distinct.
ParamKind = Literal[
    "matrix",
    "head_map",
    "scale_inv",
    "embedding",
    "norm",
    "norm_offset",
    "bias",
    "router_bias",
    "conv",
    "expert_table",
]

DTYPE_OF_FORMAT: Mapping[WeightFormat, str] = {
    word: info.data_dtype for word, info in FORMATS.items()
}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, dtype name and kind of one leaf, all as held in memory."""

    shape: tuple[int, ...]
    dtype: str
    kind: ParamKind


def num_blocks(size: int) -> int:
    """Scale blocks along a dimension; the last may be partial."""
    return -(-size // SCALE_BLOCK)


def new_param(spec: ParamSpec) -> nnx.Param:
    """A leaf that carries its description."""
    return nnx.Param(jnp.zeros(spec.shape, jnp.dtype(spec.dtype)), spec=spec)


ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Description:
    """A model without its weights.

    graphdef: the structure `nnx.merge` wants.
    specs: every leaf, in the order of the flat leaves.
    """

    graphdef: Any
    specs: Mapping[str, ParamSpec]
    _state: nnx.State

    def fill(self, leaves: Mapping[str, jax.Array]) -> nnx.State:
        """The state of the described model with these arrays; all leaves, right shapes and dtypes.

        `jax.tree.leaves` of the result lists the arrays in a fixed order and `nnx.merge(graphdef,
        state)` is the model.
        """
        assert leaves.keys() == self.specs.keys(), set(leaves) ^ set(self.specs)
        flat = []
        for path, variable in nnx.to_flat_state(self._state):
            name = dotted(path)
            spec, array = self.specs[name], leaves[name]
            given = (tuple(array.shape), jnp.dtype(array.dtype).name)
            assert given == (spec.shape, spec.dtype), (name, given, spec)
            flat.append((path, variable.replace(array)))
        return nnx.from_flat_state(flat)


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def describe(make_model: Callable[[], ModelT]) -> Description:
    """Runs `make_model` without allocating and lists what it would hold."""
    graphdef, state = nnx.split(nnx.eval_shape(make_model))
    specs = {}
    for path, variable in nnx.to_flat_state(state):
        spec = variable.get_metadata("spec")
        assert isinstance(spec, ParamSpec), path
        specs[dotted(path)] = spec
    return Description(graphdef, specs, state)
