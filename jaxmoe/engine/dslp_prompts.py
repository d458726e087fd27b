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
from jaxmoe.engine.long_prompts import LongPrompts, streaming_pace
from jaxmoe.engine.placement import free_bytes
from jaxmoe.engine.prompt_rates import DEVICE_FLOPS, token_flops
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.prefill.dslp_devices import make_dslp, plan_for
from jaxmoe.prefill.stream import PromptStream
from jaxmoe.scheduler.prefill_route import DslpRates, PrefillRoute
from jaxmoe.weights import memory
from jaxmoe.weights.loaded_model import LoadedModel

# Of what XLA may take, and FLOP/s of a CPU thread: a guess, as in prompt_rates.py, which the first
# prompts correct.
_SHARE, _THREAD_FLOPS = 0.9, 1e11


def all_devices(home: Device) -> list[Device]:
    """Those of the platform, `home` first."""
    others = [d for d in jax.local_devices(backend=home.platform) if d != home]
    return [home, *others]


def unused_devices(config: EngineConfig, home: Device) -> tuple[str, ...]:
    """A note for the start-up report where prompts could use more devices than they do."""
    if config.prefill != "auto" or home.platform == "cpu" or len(all_devices(home)) < 2:
        return ()
    return (
        "prompts use one GPU: several at once (--prefill=dslp) were not measured yet, so that "
        "prefill=auto does not choose them",
    )


def start_dslp(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    home: Device,
    runtime: CpuRuntime,
    loaded: LoadedModel,
    caches: Callable[[], list[tuple[jax.Array, ...]]],
    on_stage: Callable[[str, float], None] = lambda stage, percent: None,
) -> LongPrompts:
    """As `start_streaming`, for `prefill="dslp"`: all prompts go this way.

    Raises: ConfigError, CapacityError, CheckpointError where it cannot be.
    """
    devices = all_devices(home)
    problem = _problem(model, loaded, devices)
    if problem is not None:
        raise ConfigError(f"prefill: dslp, but {problem}; use prefill=slp or chunked")
    assert loaded.host_store is not None
    drivers = {device: DeviceDriver.for_device(device) for device in devices}
    on_stage("page-locking the experts", 0.0)
    try:
        # For all devices at once.
        drivers[home].lock_store(
            loaded.host_store.native,
            lambda done, total: on_stage("page-locking the experts", 100 * done / max(total, 1)),
        )
    except OSError as error:
        raise CapacityError(f"prefill: dslp, but {error}") from None
    plan = plan_for(
        model,
        loaded,
        len(devices),
        free_bytes=_free_bytes(devices, loaded),
        max_prompt_tokens=layout.max_model_len,
        max_context=layout.max_model_len,
        compute_dtype=config.compute_dtype,
    )
    on_stage("copying weights to the other devices", 0.0)
    dslp, rings = make_dslp(
        loaded, model, devices, drivers, runtime, plan, page_size=layout.page_size
    )
    try:
        on_stage("measuring the buses", 0.0)
        flops = token_flops(model)
        rates = DslpRates(
            pass_s=rings.measure_pass_s(),
            # Everything else of a token is about as much again.
            token_s=2 * flops / DEVICE_FLOPS / len(devices),
            max_tokens=plan.max_tokens,
            num_devices=len(devices),
        )
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
        stream=PromptStream(dslp, caches, "dslp"),
        worker=None,
        route=route,
        ring=rings,
        report=plan.describe(),
        pace=streaming_pace(config, rings.total_bytes, rates.pass_s),
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
        return memory.available_bytes() // (2 * len(devices)) - weights
    left = [free_bytes(d) - (0 if d == devices[0] else weights) for d in devices]
    return int(min(left) * _SHARE)
