"""Layers of a model by kind: one compiled program serves all layers of a kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxmoe.models.decoder import Decoder, DecoderLayer
from jaxmoe.prefill.layer_weights import split_layers


@dataclasses.dataclass(frozen=True, eq=False)  # hashing a graphdef takes milliseconds a call
class LayerKind:
    """Layers that share their programs: the same modules, whatever the weights."""

    graphdef: Any
    treedef: Any
    is_moe: bool

    def layer(self, leaves: list[jax.Array]) -> DecoderLayer:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def layers_by_kind(model: Decoder) -> list[tuple[LayerKind, list[jax.Array]]]:
    """Of every layer its kind and its leaves."""
    kinds: dict[Any, LayerKind] = {}
    layers = []
    for parts in split_layers(model):
        kind = LayerKind(parts.graphdef, parts.treedef, parts.is_moe)
        kind = kinds.setdefault((parts.graphdef, parts.treedef), kind)
        layers.append((kind, parts.leaves))
    return layers
