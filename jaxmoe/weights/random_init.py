"""Random weights of any configuration, made in memory: `load_format="dummy"`.

The result is a LoadedModel like any other, in the formats a checkpoint of that config.json would
have, so that speed and memory can be measured before anything is downloaded. The text it writes is
noise.
"""

from __future__ import annotations

import logging
from functools import partial

import jax
import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.quant.formats import FORMATS
from jaxmoe.weights import memory
from jaxmoe.weights.buffers import aligned_empty, to_jax
from jaxmoe.weights.host_store import ExpertLayout, HostStore
from jaxmoe.weights.loaded_model import LoadedModel, LoadReport
from jaxmoe.weights.loader import leaf_bytes
from jaxmoe.weights.model_registry import ModelRegistry
from jaxmoe.weights.name_map import Matrix
from jaxmoe.weights.progress import ByteProgress
from jaxmoe.weights.random_values import RandomValues, fan_in_of, format_at
from jaxmoe.weights.read_pool import run_all
from jaxmoe.weights.tensor_table import MATRICES, expert_layouts

_log = logging.getLogger(__name__)


def fill_expert_matrix(
    values: RandomValues, store: HostStore, layer: int, expert: int, which: Matrix
) -> int:
    """Random weights, with their scales, for one matrix of an arena; returns the weights' bytes."""
    name, layout = f"{layer}.{expert}.{which}", store.layouts[layer]
    fan_in = layout.shape(which)[1]
    num_bytes = 0
    for first_row, rows in store.writable_rows(layer, expert, which):
        values.fill_weights(rows, name, fan_in, first_row * rows.shape[1])
        num_bytes += rows.nbytes
    shape, dtype = layout.scale_shape(which), FORMATS[layout.format].scale_dtype
    if shape is not None and dtype is not None:
        scales = values.scales(layout.format, shape, name, fan_in, jax.numpy.dtype(dtype))
        store.set_scale(layer, expert, which, scales)
    return num_bytes


def random_experts(runtime: CpuRuntime, layout: ExpertLayout, seed: int = 0) -> HostStore:
    """A store of one layer of random experts, for measurements; the caller closes it."""
    values = RandomValues(seed)
    store = HostStore.create(runtime, [layout])
    tasks = [
        partial(fill_expert_matrix, values, store, 0, expert, which)
        for expert in range(layout.num_experts)
        for which in MATRICES
    ]
    try:
        run_all(tasks, runtime.num_threads)
    except BaseException:
        store.close()
        raise
    return store


def random_model(
    config: ModelConfig,
    models: ModelRegistry,
    runtime: CpuRuntime,
    *,
    compute_dtype: jax.typing.DTypeLike = "bfloat16",
    seed: int = 0,
    num_threads: int | None = None,
    progress: bool | None = None,
) -> LoadedModel:
    """Makes random weights; the same seed and configuration make the same.

    Args:
      config: of the model to invent.
      models: `jaxmoe.models.registry`.
      runtime: decides how the arena is split over NUMA nodes.
      compute_dtype: of the model's activations.
      seed: of the values.
      num_threads: that fill memory; by default the runtime's.
      progress: draw a bar on stderr; None does where it is a terminal.

    Raises:
      CapacityError: if the model does not fit into memory.
    """
    formats = models.configured_formats(config)
    description = models.describe_model(config, compute_dtype, formats)
    layouts = expert_layouts(config, formats)
    all_leaf_bytes = sum(map(leaf_bytes, description.specs.values()))
    expert_bytes = sum(layout.total_bytes for layout in layouts)
    planned = all_leaf_bytes + expert_bytes
    memory.require(planned, f"random weights of {config.architecture}")
    values = RandomValues(seed)
    buffers: dict[str, np.ndarray] = {}
    store = HostStore.create(runtime, layouts) if layouts else None

    def make_leaf(path: str) -> None:
        spec = description.specs[path]
        buffer = aligned_empty(spec.shape, np.dtype(jax.numpy.dtype(spec.dtype)))
        specs = description.specs
        fan_in, weight_format = fan_in_of(path, spec, specs), format_at(path, spec, specs)
        values.fill(buffer, path, spec.kind, fan_in, weight_format)
        buffers[path] = buffer
        bar.add(buffer.nbytes)

    def make_matrix(store: HostStore, layer: int, expert: int, which: Matrix) -> None:
        bar.add(fill_expert_matrix(values, store, layer, expert, which))

    tasks = [partial(make_leaf, path) for path in description.specs]
    if store is not None:
        tasks += [
            partial(make_matrix, store, layer, expert, which)
            for layer, layout in enumerate(layouts)
            for expert in range(layout.num_experts)
            for which in MATRICES
        ]
    try:
        with ByteProgress(planned, "random weights", progress) as bar:
            run_all(tasks, runtime.num_threads if num_threads is None else num_threads)
            leaves = {path: to_jax(buffer) for path, buffer in buffers.items()}
    except BaseException:
        if store is not None:
            store.close()
        raise
    report = LoadReport(
        source=f"random {config.architecture}, seed {seed}",
        backing="arena",
        num_tensors=len(tasks),
        ignored=(),
        leaf_bytes=all_leaf_bytes,
        expert_bytes=expert_bytes,
        read_bytes=0,
        seconds=bar.seconds,
        planned_bytes=planned,
        peak_rss_bytes=memory.peak_rss_bytes(),
    )
    _log.info("%s", report.describe())
    state = description.fill(leaves)
    return LoadedModel(description.graphdef, state, description.specs, store, report)
