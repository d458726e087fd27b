"""Prompts that all devices of the host compute together, in an engine: what that takes, or why it
cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax

from jaxmoe.common.errors import CapacityError, ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import CompressedConfig, MlaConfig, ModelConfig
from jaxmoe.engine.long_prompts import (
    SHARE,
    LongPrompts,
    driver_of,
    has_bus,
    room_for_streaming,
)
from jaxmoe.engine.placement import free_bytes
from jaxmoe.engine.prompt_rates import DEVICE_FLOPS, OnStage, dslp_rates, token_flops
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.prefill.dslp_devices import make_dslp, plan_for
from jaxmoe.prefill.dslp_plan import DslpPlan, TogetherPlan, plan_together
from jaxmoe.prefill.ring import ExpertRing
from jaxmoe.prefill.stream import PromptStream
from jaxmoe.scheduler.prefill_route import PrefillRoute
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.memory import gib

# FLOP/s of a CPU thread: a guess, as in prompt_rates.py, which the first prompts correct.
_THREAD_FLOPS = 1e11


def all_devices(home: Device) -> list[Device]:
    """Those of the platform, `home` first."""
    others = [d for d in jax.local_devices(backend=home.platform) if d != home]
    return [home, *others]


def plan_devices(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    home: Device,
    prefill_device: Device | None,
    loaded: LoadedModel,
) -> tuple[TogetherPlan | None, tuple[str, ...]]:
    """How all devices are used where `prefill="auto"` is to choose, for every prompt, between one
    and all of them; None where it cannot. And notes for the start-up report.
    """
    devices = all_devices(home)
    if config.prefill != "auto" or prefill_device is not None or len(devices) < 2:
        return None, ()
    if not has_bus(config, home):
        return None, ()
    why = _problem(model, loaded, devices)
    if why is None:
        try:
            dslp = _plan(config, model, layout, devices, loaded)
            return plan_together(dslp, room_for_streaming(home), layout.max_model_len), ()
        except CapacityError as error:
            why = str(error)
    return None, (f"prompts use one of {len(devices)} devices: {why}",)


def add_devices(
    long_prompts: LongPrompts,
    plan: TogetherPlan,
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    home: Device,
    runtime: CpuRuntime,
    loaded: LoadedModel,
    on_stage: OnStage = lambda stage, percent: None,
) -> None:
    """Makes dslp one more way of `long_prompts`, which stream to `home`. What arrives there for one
    way or the other lies in the same slots: prompts are streamed one after the other.

    Raises: CheckpointError.
    """
    stream, route, (ring, _) = long_prompts.stream, long_prompts.route, long_prompts.rings[0]
    assert stream is not None and isinstance(ring, ExpertRing)
    devices = all_devices(home)
    drivers = {device: driver_of(config, device) for device in devices}
    on_stage("copying weights to the other devices", 0.0)
    dslp, rings = make_dslp(
        loaded,
        model,
        devices,
        drivers,
        runtime,
        plan.dslp,
        page_size=layout.page_size,
        first=ring.ring,
    )
    stream.ways["dslp"] = dslp  # closes it from here on
    on_stage("measuring the buses", 0.0)
    token_s = route.streamed_token_s
    route.dslp = dslp_rates(model, layout, plan.dslp, rings, token_s, long_prompts.known)
    route.free_devices = len(devices)
    long_prompts.rings.append((rings, rings.total_bytes / route.dslp.pass_s))
    long_prompts.report += (
        f"; or, in the same slots, {plan.dslp.describe()}; at most {gib(plan.first_bytes)} of the "
        "first one's memory"
    )


def start_dslp(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    home: Device,
    runtime: CpuRuntime,
    loaded: LoadedModel,
    caches: Callable[[], list[tuple[jax.Array, ...]]],
    on_stage: OnStage = lambda stage, percent: None,
) -> LongPrompts:
    """As `start_streaming`, for `prefill="dslp"`: all prompts go this way.

    Raises: ConfigError, CapacityError, CheckpointError where it cannot be.
    """
    devices = all_devices(home)
    problem = _problem(model, loaded, devices)
    if problem is not None:
        raise ConfigError(f"prefill: dslp, but {problem}; use prefill=slp or chunked")
    assert loaded.host_store is not None
    drivers = {device: driver_of(config, device) for device in devices}
    on_stage("page-locking the experts", 0.0)
    try:
        # For all devices at once.
        drivers[home].lock_store(
            loaded.host_store.native,
            lambda done, total: on_stage("page-locking the experts", 100 * done / max(total, 1)),
        )
    except OSError as error:
        raise CapacityError(f"prefill: dslp, but {error}") from None
    plan = _plan(config, model, layout, devices, loaded)
    on_stage("copying weights to the other devices", 0.0)
    dslp, rings = make_dslp(
        loaded, model, devices, drivers, runtime, plan, page_size=layout.page_size
    )
    try:
        on_stage("measuring the buses", 0.0)
        flops = token_flops(model)
        # Everything else of a token is about as much again.
        rates = dslp_rates(model, layout, plan, rings, 2 * flops / DEVICE_FLOPS)
    except BaseException:
        dslp.close()
        raise
    route = PrefillRoute(
        pass_s=math.inf,
        streamed_token_s=math.inf,
        chunked_token_s=flops / (_THREAD_FLOPS * runtime.num_threads),
        max_tokens=plan.max_tokens,
        forced="dslp",
        dslp=rates,
        free_devices=len(devices),
    )
    return LongPrompts(
        stream=PromptStream({"dslp": dslp}, caches),
        worker=None,
        route=route,
        rings=[(rings, rings.total_bytes / rates.pass_s)],
        report=plan.describe(),
        share=config.prefill_bandwidth_share,
    )


def _plan(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    devices: Sequence[Device],
    loaded: LoadedModel,
) -> DslpPlan:
    """Raises: CapacityError."""
    return plan_for(
        model,
        loaded,
        len(devices),
        free_bytes=_free_bytes(devices, loaded),
        max_prompt_tokens=layout.max_model_len,
        max_context=layout.max_model_len,
        compute_dtype=config.compute_dtype,
    )


def _problem(model: ModelConfig, loaded: LoadedModel, devices: Sequence[Device]) -> str | None:
    if len(devices) < 2:
        advice = ""
        if devices[0].platform == "cpu":
            advice = " (JAX_NUM_CPU_DEVICES=2 lets the CPU stand in for two)"
        return f"JAX sees one device of platform {devices[0].platform}; wanted two or more{advice}"
    if loaded.host_store is None:
        return f"{model.architecture} has no routed experts to stream"
    if model.linear_attention is not None:
        return f"{model.architecture}'s recurrent layers take their tokens one after the other"
    if isinstance(model.attention, CompressedConfig):
        return f"{model.architecture}'s entries take their tokens one after the other"
    if isinstance(model.attention, MlaConfig) and model.attention.indexer is not None:
        return (
            f"{model.architecture}'s layers choose among all positions, of which a device has some"
        )
    if model.moe.router.num_experts < len(devices):
        return f"{model.moe.router.num_experts} experts are fewer than {len(devices)} devices"
    return None


def _free_bytes(devices: Sequence[Device], loaded: LoadedModel) -> int:
    """Of the device with the least, when the other weights are on it."""
    weights = sum(leaf.nbytes for leaf in loaded.leaves)
    if devices[0].platform == "cpu":
        return room_for_streaming(devices[0]) // len(devices) - weights
    left = [free_bytes(d) - (0 if d == devices[0] else weights) for d in devices]
    return int(min(left) * SHARE)
