"""Everything stream-loading prefill needs on one device, put together: weights, ring, programs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
from flax import nnx

from jaxmoe.config.model_config import CompressedConfig, MlaConfig, ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import Ops
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.experts import DeviceGroups, ExpertGroup
from jaxmoe.kv_cache import store as cache_store
from jaxmoe.models.decoder import Decoder, cache_spec
from jaxmoe.moe.experts_streamed import GroupExperts, NativeGroups, NoRing
from jaxmoe.prefill.layer_weights import LayerParts, WeightSlots, other_weights, split_layers
from jaxmoe.prefill.plan import PromptShape, RingBounds, SlpPlan, Weights, plan_slp
from jaxmoe.prefill.ring import ExpertRing
from jaxmoe.prefill.slp import LoadingRing, SlpPrefill
from jaxmoe.weights.loaded_model import LoadedModel


def prompt_shape(config: ModelConfig, expert_bytes: int, compute_bytes: int = 2) -> PromptShape:
    """What a model's prompts take of device memory."""
    attention = config.attention
    assert not isinstance(attention, CompressedConfig), "its prompts are not streamed"
    heads = attention.num_heads
    if isinstance(attention, MlaConfig):
        key = attention.nope_head_dim + attention.rope_head_dim
        value = attention.v_head_dim
        latent = attention.kv_lora_rank + attention.rope_head_dim
        # Queries, expanded keys and values, two partial results in float32 and their sum.
        per_token = heads * (3 * key * compute_bytes + value * (compute_bytes + 3 * 4)) + latent * 8
    else:
        per_token = heads * attention.head_dim * (2 * 4 + 2 * compute_bytes + 2 * 4)
        per_token += 2 * attention.num_kv_heads * attention.head_dim * (4 + compute_bytes)
    widest = max(config.dense_intermediate or 0, config.moe.shared_intermediate or 0)
    per_token += widest * (2 * 4 + compute_bytes)
    return PromptShape(
        num_experts=config.moe.router.num_experts,
        experts_per_token=config.moe.router.experts_per_token,
        expert_bytes=expert_bytes,
        hidden=config.hidden_size,
        intermediate=config.moe.expert_intermediate,
        attention_bytes=per_token,
        compute_bytes=compute_bytes,
    )


def prompt_row(token_ids: Sequence[int], page_size: int) -> StepRow:
    """A prompt alone in the cache, its pages in order."""
    pages = list(range(-(-len(token_ids) // page_size)))
    return StepRow(token_ids, 0, pages, 0, settings=None)  # pyright: ignore[reportArgumentType]


def make_slp(
    loaded: LoadedModel,
    config: ModelConfig,
    device: Device,
    driver: DeviceDriver,
    runtime: CpuRuntime,
    *,
    free_bytes: int,
    max_prompt_tokens: int,
    page_size: int,
    pages_per_sequence: int,
    chunk_tokens: int | None = None,
    compute_bytes: int = 2,
    groups: GroupExperts | None = None,
    weights: Weights | None = None,
    bounds: RingBounds | None = None,
) -> tuple[SlpPrefill, ExpertRing, SlpPlan, Callable[[LoadingRing], SlpPrefill]]:
    """The ring and the programs for a model.

    free_bytes: of the device, to be used at most. weights: None: the other weights are on `device`
    already; else they are in host memory, and the plan makes room for them or for the slots that
    they are streamed through (`plan_slp`). bounds: of the ring, where others use it too. The last
    result makes the same programs on another ring.

    Raises: CapacityError, CheckpointError.
    """
    store = loaded.host_store
    assert store is not None
    layout = store.layouts[0]
    shape = prompt_shape(config, layout.total_bytes // layout.num_experts, compute_bytes)
    options: dict[str, Any] = {"bounds": bounds}
    if chunk_tokens is not None:
        options["chunk_tokens"] = chunk_tokens
    layers: list[LayerParts] = []
    if weights is not None:
        model = nnx.merge(loaded.graphdef, loaded.state)
        assert isinstance(model, Decoder)
        layers = split_layers(model)
        all_bytes = sum(leaf.nbytes for leaf in loaded.leaves)
        options["others"] = other_weights([layer.leaves for layer in layers], all_bytes)
        options["weights"] = weights
    plan = plan_slp(shape, free_bytes, max_prompt_tokens, **options)
    if weights is not None and not plan.weight_slots:
        loaded = dataclasses.replace(loaded, state=jax.device_put(loaded.state, device))
    ring = ExpertRing(driver, device, store, plan, layers)
    on_cpu = device.platform == "cpu"
    how = groups or (NativeGroups(runtime) if on_cpu else DeviceGroups(plan.window_rows))

    def ops(context: int) -> Ops:
        if on_cpu:
            return NativeOps(runtime, None, "matrix")
        return DeviceOps(None, "prefill", one_sequence=True, context=context)

    def make(ring: LoadingRing) -> SlpPrefill:
        return SlpPrefill(
            loaded.graphdef,
            loaded.state,
            ops,
            ring,
            plan,
            page_size=page_size,
            pages_per_sequence=pages_per_sequence,
            groups=how,
            device=device,
        )

    return make(ring), ring, plan, make


class SlpDevice:
    """A model's prefill on one device with a cache of its own, for benchmarks and tests."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: ModelConfig,
        device: Device,
        driver: DeviceDriver,
        runtime: CpuRuntime,
        *,
        max_prompt_tokens: int,
        free_bytes: int | None = None,
        page_size: int = 16,
        chunk_tokens: int | None = None,
        compute_dtype: str = "bfloat16",
        groups: GroupExperts | None = None,
        weights: Weights = "resident",
    ) -> None:
        pages = -(-max_prompt_tokens // page_size)
        self._caches = cache_store.allocate(
            cache_spec(config, compute_dtype), pages, page_size, device=device
        )
        jax.block_until_ready(self._caches)
        if free_bytes is None:
            free_bytes = driver.memory_info()[0] * 9 // 10
        self._slp, self._ring, self.plan, make = make_slp(
            loaded,
            config,
            device,
            driver,
            runtime,
            free_bytes=free_bytes,
            max_prompt_tokens=max_prompt_tokens,
            page_size=page_size,
            pages_per_sequence=pages,
            chunk_tokens=chunk_tokens,
            compute_bytes=jax.numpy.dtype(compute_dtype).itemsize,
            groups=groups,
            weights=weights,
        )
        self._resident = make(Resident(self._ring.groups, self._ring.weights))
        self.page_size, self._device = page_size, device

    def prefill(self, row: StepRow, *, streamed: bool = True) -> jax.Array:
        """The residual stream of the row's last token. Not streamed: with whatever weights lie in
        the ring, to measure computing alone."""
        slp = self._slp if streamed else self._resident
        return slp.prefill(row, lambda: self._caches)

    def layers(self, row: StepRow, *, streamed: bool = True) -> Generator[int, None, jax.Array]:
        """`SlpPrefill.layers` of the row."""
        slp = self._slp if streamed else self._resident
        return slp.layers(row, lambda: self._caches)

    def copy_alone(self) -> float:
        """Bytes per second of one run's copies with nothing computed."""
        begin = time.perf_counter()
        self._ring.drain()
        return self.streamed_bytes / (time.perf_counter() - begin)

    @property
    def streamed_bytes(self) -> int:
        return self._ring.total_bytes

    def stats(self) -> dict[str, float]:
        return self._ring.stats()

    def close(self) -> None:
        """Ends the loader; the weights stay the caller's."""
        self._ring.close()

    def peak_bytes(self) -> int:
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use", 0)


class Resident(NoRing):
    """The slots of a ring, or of several devices' rings, as if their weights were always there."""

    def __init__(self, groups: Sequence[ExpertGroup], weights: WeightSlots | None = None):
        self.groups, self.weights = groups, weights

    def start(self) -> None: ...
    def finish(self) -> None: ...
    def abort(self, cause: str) -> None: ...
    def close(self) -> None: ...
