"""A model cut into layers that are compiled alone, each program serving all layers of a kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxmoe.models.decoder import Decoder, DecoderLayer
from jaxmoe.moe.moe_block import MoeBlock


@dataclasses.dataclass(frozen=True, eq=False)  # hashing a graphdef takes milliseconds a call
class LayerKind:
    """Layers that share their programs: the same modules, whatever the weights."""

    graphdef: Any
    treedef: Any
    is_moe: bool

    def layer(self, leaves: list[jax.Array]) -> DecoderLayer:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def split_layers(model: Decoder) -> list[tuple[LayerKind, list[jax.Array]]]:
    """Of every layer its kind and its leaves."""
    layers: list[tuple[LayerKind, list[jax.Array]]] = []
    kinds: dict[Any, LayerKind] = {}
    for layer in model.layers:
        if is_moe := isinstance(layer.mlp, MoeBlock):
            layer.mlp.moe_layer_idx = 0  # the only difference between MoE layers
        graphdef, state = nnx.split(layer)
        leaves, treedef = jax.tree.flatten(state)
        kind = LayerKind(graphdef, treedef, is_moe)
        layers.append((kinds.setdefault((graphdef, treedef), kind), leaves))
    return layers
