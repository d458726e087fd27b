"""A checkpoint directory of random weights, in the layout a configuration's models are shipped in.

The table the loader expects, turned around: every tensor it would look for is written, one at a
time, so that a checkpoint of any size needs the memory of its largest tensor.
tools/make_checkpoint.py is the command.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.quant.formats import WeightFormat
from jaxmoe.weights.model_registry import ModelRegistry
from jaxmoe.weights.name_map import StoredTensor
from jaxmoe.weights.param_spec import ParamKind
from jaxmoe.weights.progress import ByteProgress
from jaxmoe.weights.random_values import RandomValues
from jaxmoe.weights.safetensors_writer import NUMPY_DTYPES, ShardWriter, write_index
from jaxmoe.weights.stored_form import StoredForm
from jaxmoe.weights.tensor_table import expert_layouts, expert_tensors, packed_tensors


@dataclasses.dataclass(frozen=True)
class InventedTensor:
    """A tensor to be written.

    fan_in: the number of inputs of the linear map it belongs to. format: that map's. value: what
    is in it, where that is not random.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: ParamKind
    fan_in: int
    format: WeightFormat | None = None
    value: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def stored_tensors(config: ModelConfig, models: ModelRegistry) -> Iterator[InventedTensor]:
    """Every tensor once: those outside the routed experts, then the experts layer by layer."""
    formats = models.configured_formats(config)
    specs = models.describe_model(config, "bfloat16", formats).specs
    names = models.name_map(config, specs, formats)
    seen: set[str] = set()
    for path, spec in specs.items():
        module = path.rpartition(".")[0]
        is_linear = spec.kind in ("matrix", "head_map", "scale_inv")
        form = formats.stored(module) if is_linear else None
        for i, tensor in enumerate(names.tensors_for(path).tensors):
            if tensor.name in seen:
                continue
            seen.add(tensor.name)
            kind = "scale_inv" if i else spec.kind  # the scales of a weight that is dequantized
            source = names.tensors_for(f"{module}.data") if is_linear else None
            weight = tensor if source is None else source.tensors[0]
            yield _invent(tensor, kind, config, weight, form)
            if tensor.name == weight.name and source is not None:
                yield from _sizes(source.others, weight)
    for layer, layout in zip(config.moe_layers, expert_layouts(config, formats), strict=True):
        form = names.expert_form(layer)
        for _, weight, scale in packed_tensors(layout, names, layer).values():
            if weight.name in seen:  # gate's and up's
                continue
            seen.add(weight.name)
            yield _invent(weight, "matrix", config, weight, form)
            if scale is not None:
                yield _invent(scale, "scale_inv", config, weight, form)
        for expert in range(layout.num_experts):
            tensors = expert_tensors(layout, names, layer, expert)
            for which, (weight, scales) in tensors.items():
                yield _invent(weight, "matrix", config, weight, form)
                for scale in scales:
                    yield _invent(scale, "scale_inv", config, weight, form)
                others = form.others(names.expert_tensor(layer, expert, which))
                yield from _sizes(others, weight)


def _sizes(names: tuple[str, ...], weight: StoredTensor) -> Iterator[InventedTensor]:
    """What says the shape of a weight that is stored in words; other packed ones have no such."""
    if weight.dtypes[0] != "I32":
        return
    n, k = weight.shape[0], _inputs(weight, None)
    for name in names:
        yield InventedTensor(name, "I32", (2,), "matrix", k, value=(n, k))


def _inputs(weight: StoredTensor, form: StoredForm | None) -> int:
    if form is not None and form.is_repacked:
        return form.inputs_of(weight.shape)
    packed = {"I32": 8, "U8": 2, "I8": 2}.get(weight.dtypes[0], 1)
    # Four axes: inputs in groups.
    inputs = weight.shape[2:] if len(weight.shape) == 4 else weight.shape[-1:]
    return math.prod(inputs) * packed


def _invent(
    tensor: StoredTensor,
    kind: ParamKind,
    config: ModelConfig,
    weight: StoredTensor,
    form: StoredForm | None,
) -> InventedTensor:
    """weight: of the linear map that the tensor belongs to, stored in `form`."""
    dtype = tensor.dtypes[0]
    # Small tensors are shipped in the model's own dtype; router biases and scales as they say.
    small = ("norm", "norm_offset", "bias", "conv")
    if kind in small and config.weight_dtype == "bfloat16" and "BF16" in tensor.dtypes:
        dtype = "BF16"
    fan_in = _inputs(weight, form)
    return InventedTensor(
        tensor.name, dtype, tensor.shape, kind, fan_in, form.format if form else None
    )


def write_random_checkpoint(
    directory: Path,
    config: ModelConfig,
    models: ModelRegistry,
    *,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    progress: bool | None = None,
) -> int:
    """Writes the safetensors files (and their index, where there are several); returns the bytes.

    Args:
      directory: made if it is not there; config.json and tokenizer are the caller's.
      config: what to write weights for.
      models: `jaxmoe.models.registry`.
      seed: of the values.
      shard_bytes: a file is closed before it would grow beyond this.
      progress: draw a bar on stderr; None does where it is a terminal.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[InventedTensor]] = [[]]
    filled = 0
    for tensor in stored_tensors(config, models):
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    values = RandomValues(seed)
    weight_map: dict[str, str] = {}
    with ByteProgress(total, "writing weights", progress) as bar:
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            listed = [(t.name, t.dtype, t.shape) for t in shard]
            with ShardWriter(directory / file, listed) as writer:
                for tensor in shard:
                    data = np.empty(tensor.shape, NUMPY_DTYPES[tensor.dtype])
                    if tensor.value is None:
                        values.fill(data, tensor.name, tensor.kind, tensor.fan_in, tensor.format)
                    else:
                        data[...] = tensor.value
                    writer.write(tensor.name, data)
                    bar.add(data.nbytes)
            weight_map.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        write_index(directory, weight_map, total)
    return total
