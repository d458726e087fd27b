"""What the loader asks of the model definitions, which lie above it: `models/registry.py` is one.

Passing that module in keeps imports going down only, and lets a test describe a model of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import jax

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights.name_map import NameMap
from jaxmoe.weights.param_spec import Description, Formats, ParamSpec
from jaxmoe.weights.stored_form import Forms, HasShape


class ModelRegistry(Protocol):
    def stored_formats(self, config: ModelConfig, tensors: Mapping[str, HasShape]) -> Forms:
        """How a checkpoint with these tensors holds each linear map."""
        ...

    def configured_formats(self, config: ModelConfig) -> Forms:
        """How a checkpoint of this configuration would."""
        ...

    def describe_model(
        self, config: ModelConfig, compute_dtype: jax.typing.DTypeLike, formats: Formats
    ) -> Description:
        """The model's structure and leaves; allocates nothing."""
        ...

    def name_map(
        self,
        config: ModelConfig,
        specs: Mapping[str, ParamSpec],
        formats: Forms | None = None,
        tensors: Collection[str] = (),
    ) -> NameMap:
        """Where the leaves come from in a checkpoint of these formats that has these tensors."""
        ...


def experts_path(layer: int) -> str:
    """The module path that stands for a layer's routed experts in `Formats`."""
    return f"layers.{layer}.mlp.experts"
