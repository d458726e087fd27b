"""All tensors a checkpoint of a configuration would hold: names, shapes, dtypes, and how to invent
values.

The same table the loader expects, turned around: tools/make_checkpoint.py writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights.model_registry import ModelRegistry
from jaxmoe.weights.name_map import StoredTensor
from jaxmoe.weights.param_spec import SCALE_BLOCK, ParamKind
from jaxmoe.weights.tensor_table import expert_layouts, expert_tensors


@dataclasses.dataclass(frozen=True)
class InventedTensor:
    """A tensor to be written: `fan_in` is the number of inputs of the linear map it belongs to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: ParamKind
    fan_in: int


def stored_tensors(config: ModelConfig, models: ModelRegistry) -> Iterator[InventedTensor]:
    """Every tensor once: those outside the routed experts, then the experts layer by layer."""
    formats = models.configured_formats(config)
    specs = models.describe_model(config, "bfloat16", formats).specs
    names = models.name_map(config, specs)
    seen: set[str] = set()
    for path, spec in specs.items():
        for tensor in names.tensors_for(path).tensors:
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            kind = spec.kind
            if len(tensor.shape) == 2 and "F8_E4M3" not in tensor.dtypes and len(tensor.dtypes) > 1:
                kind = "scale_inv"  # of a weight that is dequantized while it is loaded
            yield _invent(tensor, kind, config)
    for layer, layout in zip(config.moe_layers, expert_layouts(config, formats), strict=True):
        for expert in range(layout.num_experts):
            for weight, scale in expert_tensors(layout, names, layer, expert).values():
                yield _invent(weight, "matrix", config)
                if scale is not None:
                    yield _invent(scale, "scale_inv", config)


def _invent(tensor: StoredTensor, kind: ParamKind, config: ModelConfig) -> InventedTensor:
    dtype = tensor.dtypes[0]
    # Small tensors are shipped in the model's own dtype; biases and scales in float32.
    if kind == "norm" and config.weight_dtype == "bfloat16" and "BF16" in tensor.dtypes:
        dtype = "BF16"
    fan_in = tensor.shape[-1] * (SCALE_BLOCK if kind == "scale_inv" else 1)
    return InventedTensor(tensor.name, dtype, tensor.shape, kind, fan_in)
