"""Runs a tiny checkpoint through the decoder, step by step, over a paged cache.

Two backends: "reference" fills the leaves by the names map from numpy arrays and runs
`ReferenceOps`; "native" loads the written checkpoint with the project's loader and runs the CPU
kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe import models
from jaxmoe.config.model_config import CompressedConfig, ModelConfig
from jaxmoe.ffi.ops import StepInputs, Weight
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.experts import DeviceGroups, ExpertGroup
from jaxmoe.moe.experts_streamed import StreamedExperts
from jaxmoe.quant.formats import scale_shape
from jaxmoe.weights.param_spec import Description
from jaxmoe.weights.stored_form import Forms, Stored
from support import tiny_models

PAGE_SIZE = 16
ConfigEdit = Callable[[ModelConfig], ModelConfig]


def _stack_experts(tensors: Mapping[str, np.ndarray], names: Any, config: ModelConfig) -> list[Any]:
    """One mapping a MoE layer of `Weight`s with a leading expert axis."""
    layers = []
    for layer in config.moe_layers:
        matrices, form = {}, names.expert_form(layer)
        for which in ("gate", "up", "down"):
            packed = names.packed_experts(layer, which)
            if packed is not None:
                parts = [packed.cut(part) for part in tensors[packed.tensor]]
                scales = []
                if packed.scale is not None:
                    scales = [[packed.scale.cut(part)] for part in tensors[packed.scale.tensor]]
            else:
                wanted = [
                    names.expert_tensor(layer, e, which)
                    for e in range(config.moe.router.num_experts)
                ]
                parts = [tensors[form.weight_name(name)] for name in wanted]
                scales = []
                if form.scale is not None:
                    held = scale_shape(form.format, *_map_shape(config, which))
                    assert held is not None
                    scales = [
                        [tensors[t.name] for t in form.scale_tensors(name, held)] for name in wanted
                    ]
            data = jnp.asarray(np.stack([form.hold_weight(part) for part in parts]))
            scale = np.stack([form.hold_scale(*part) for part in scales]) if scales else None
            matrices[which] = Weight(data, None if scale is None else jnp.asarray(scale))
        layers.append(matrices)
    return layers


def _map_shape(config: ModelConfig, which: str) -> tuple[int, int]:
    hidden, width = config.hidden_size, config.moe.expert_intermediate
    return (hidden, width) if which == "down" else (width, hidden)


def stored_formats(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Forms:
    return models.stored_formats(
        config,
        {
            name: Stored(tiny_models.DTYPE_NAMES[array.dtype], array.shape)
            for name, array in tensors.items()
        },
    )


@dataclasses.dataclass
class Row:
    """A row of the runner: its pages and how many tokens it holds."""

    pages: np.ndarray
    length: int = 0


class TinyRunner:
    """One model in one compute dtype with a cache for `num_rows` sequences."""

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: str,
        step_fn: Callable[..., Any],
        weights: Any,
        *,
        num_rows: int = 3,
        max_tokens: int | None = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        self._step_fn = jax.jit(step_fn, donate_argnums=2, compiler_options=compiler_options)
        self._weights = weights
        if max_tokens is None:  # the longest of the fixtures' prompts, and what follows it
            max_tokens = 288 if isinstance(config.attention, CompressedConfig) else 112
        pages_each = -(-max_tokens // PAGE_SIZE)
        # Pages in no order, so that a position read from the wrong page shows.
        pages = np.random.default_rng(0).permutation(num_rows * pages_each).astype(np.int32)
        self._rows = [Row(p) for p in pages.reshape(num_rows, pages_each)]
        self._caches = [
            tuple(
                jnp.zeros((pages.size, a.slots(PAGE_SIZE), a.num_heads, a.head_dim), a.dtype)
                for a in arrays
            )
            # What no token may read is NaN.
            + tuple(jnp.full((num_rows, *a.shape), jnp.nan, a.dtype) for a in states)
            for arrays, states in zip(
                models.cache_spec(config, compute_dtype), models.state_spec(config), strict=True
            )
        ]
        self._has_states = any(models.state_spec(config))

        self.keep: Any = None  # what must live as long as the runner

    def change_weights(self, weights: Any) -> None:
        """Others of the same shapes and dtypes, so that nothing is compiled again."""
        self._weights = weights
        self.reset()

    def reset(self) -> None:
        for row in self._rows:
            row.length = 0

    def step(self, tokens: Sequence[Sequence[int]], num_tokens: int) -> list[np.ndarray]:
        """Appends `tokens[row]` to every row in one step of `num_tokens`; logits `[n, V]` a row."""
        packed = np.full((4, num_tokens), -1, np.int32)  # token, position, row, slot
        at = 0
        for r, new in enumerate(tokens):
            row = self._rows[r]
            positions = np.arange(row.length, row.length + len(new), dtype=np.int32)
            slots = row.pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            packed[:, at : at + len(new)] = [list(new), positions, [r] * len(new), slots]
            at += len(new)
            row.length += len(new)
        block_tables = np.stack([row.pages for row in self._rows])
        step = StepInputs(*packed, block_tables)
        if self._has_states:
            slots = np.arange(len(self._rows), dtype=np.int32)
            nowhere = np.full(num_tokens, -1, np.int32)
            step = dataclasses.replace(step, state_from=slots, state_to=slots, state_saves=nowhere)
        logits, self._caches = self._step_fn(self._weights, step, self._caches)
        logits = np.asarray(logits)
        ends = np.cumsum([len(new) for new in tokens])
        return np.split(logits[:at], ends[:-1])


TensorsEdit = Callable[[dict[str, np.ndarray]], None]


def reference_runner(case: str, compute_dtype: str, edit: ConfigEdit | None = None) -> TinyRunner:
    """The model of a case on `ReferenceOps`; `edit` changes the config, as mutation tests do."""
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    if edit is not None:
        config = edit(config)
    described, weights = _reference_weights(config, case, compute_dtype)

    def step_fn(weights: Any, step: StepInputs, caches: Any) -> Any:
        state, experts = weights
        model = nnx.merge(described.graphdef, state)
        return model(step, caches, ReferenceOps(experts), jnp.arange(step.token_ids.shape[0]))

    # Compiling takes most of the time of these small models.
    quickly = {"xla_backend_optimization_level": 1}
    return TinyRunner(config, compute_dtype, step_fn, weights, compiler_options=quickly)


def change_stored(runner: TinyRunner, case: str, compute_dtype: str, edit: TensorsEdit) -> None:
    """Gives a reference runner of a case the weights that its changed tensors would make."""
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    runner.change_weights(_reference_weights(config, case, compute_dtype, edit)[1])


def _reference_weights(
    config: ModelConfig, case: str, compute_dtype: str, edit: TensorsEdit | None = None
) -> tuple[Description, Any]:
    """What the leaves and experts of a case are made of, through the names map."""
    tensors = dict(tiny_models.make_tensors(case))
    if edit is not None:
        edit(tensors)
    return weights_of(config, tensors, compute_dtype)


def weights_of(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], compute_dtype: str
) -> tuple[Description, Any]:
    """The model of a checkpoint's tensors, its state and experts."""
    formats = stored_formats(config, tensors)
    described = models.describe_model(config, compute_dtype, formats)
    names = models.name_map(config, described.specs, formats)
    leaves = {}
    for path in described.specs:
        source = names.tensors_for(path)
        leaves[path] = jnp.asarray(source.transform(*(tensors[name] for name in source.names)))
    return described, (described.fill(leaves), _stack_experts(tensors, names, config))


def device_runner(
    case: str, compute_dtype: str, kind: str, *, one_sequence: bool = False, group: int = 4
) -> TinyRunner:
    """The model of a case on `DeviceOps`, its kernels interpreted; experts in groups of `group`."""
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    described, weights = _reference_weights(config, case, compute_dtype)
    num_experts = config.moe.router.num_experts

    def step_fn(weights: Any, step: StepInputs, caches: Any) -> Any:
        state, layers = weights
        model = nnx.merge(described.graphdef, state)

        def experts(x: Any, ids: Any, combine: Any, layer: int, **options: Any) -> Any:
            whole = [layers[layer][which] for which in ("gate", "up", "down")]
            groups = []
            for first in range(0, num_experts, group):
                part = slice(first, first + group)
                scales = [None if w.scale_inv is None else w.scale_inv[part] for w in whole]
                groups.append(ExpertGroup(*(w.data[part] for w in whole), *scales))
            streamed = StreamedExperts(groups, num_experts, DeviceGroups(128, interpret=True))
            return streamed(x, ids, combine, layer, **options)

        ops = DeviceOps(experts, kind, one_sequence=one_sequence, interpret=True)
        return model(step, caches, ops, jnp.arange(step.token_ids.shape[0]))

    rows = 1 if one_sequence else 3
    quickly = {"xla_backend_optimization_level": 0}
    return TinyRunner(
        config, compute_dtype, step_fn, weights, num_rows=rows, compiler_options=quickly
    )


def native_runner(
    case: str, compute_dtype: str, folder: Path, family: str, edit: ConfigEdit | None = None
) -> TinyRunner:
    """The same on the CPU kernels: the checkpoint written to `folder` and loaded as shipped."""
    from jaxmoe.ffi.cpu_runtime import CpuRuntime
    from jaxmoe.ffi.native_ops import NativeOps
    from jaxmoe.models import registry
    from jaxmoe.weights.loader import load_model
    from jaxmoe.weights.safetensors_reader import Checkpoint

    if not (folder / "config.json").exists():
        tiny_models.write_checkpoint(folder, case)
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    if edit is not None:
        config = edit(config)
    runtime = CpuRuntime(num_threads=1)  # more would only wait for each other here
    loaded = load_model(
        Checkpoint.open(folder), config, registry, runtime, compute_dtype=compute_dtype
    )
    ops = NativeOps(runtime, loaded.host_store, family)

    def step_fn(state: Any, step: StepInputs, caches: Any) -> Any:
        model = nnx.merge(loaded.graphdef, state)
        return model(step, caches, ops, jnp.arange(step.token_ids.shape[0]))

    runner = TinyRunner(config, compute_dtype, step_fn, loaded.state)
    runner.keep = (loaded, ops, runtime)
    return runner
