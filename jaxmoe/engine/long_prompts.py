"""Stream-loading prefill in an engine: when it is there, what it takes, which prompts get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from jaxmoe.common.errors import CapacityError, CheckpointError, ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import MlaConfig, ModelConfig
from jaxmoe.engine.placement import free_bytes
from jaxmoe.engine.prompt_rates import make_route
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.prefill.device import make_slp
from jaxmoe.prefill.rank_rings import RankRings
from jaxmoe.prefill.ring import ExpertRing
from jaxmoe.prefill.stream import PromptStream
from jaxmoe.scheduler.prefill_route import PrefillRoute
from jaxmoe.weights import memory
from jaxmoe.weights.loaded_model import LoadedModel

# Of what XLA may take: the rest is for programs' temporaries outside the plan.
_SHARE = 0.9


@dataclasses.dataclass
class LongPrompts:
    """The stream, its ring and the route; `close` gives the device's memory back."""

    stream: PromptStream
    route: PrefillRoute
    ring: ExpertRing | RankRings
    report: str

    def on_compile(self, call: Callable[[bool], None]) -> None:
        """Whom to tell when programs are compiled, and when they are."""
        self.stream.slp.on_compile = call

    def close(self) -> None:
        self.stream.close()


def start_streaming(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    device: Device,
    runtime: CpuRuntime,
    loaded: LoadedModel,
    caches: Callable[[], list[tuple[jax.Array, ...]]],
    on_stage: Callable[[str, float], None] = lambda stage, percent: None,
) -> tuple[LongPrompts | None, tuple[str, ...]]:
    """None where prompts are computed in chunks only: without a GPU, unless asked for. And notes
    for the start-up report.

    Raises: CapacityError, CheckpointError where `prefill="slp"` cannot be.
    """
    on_cpu = device.platform == "cpu"
    if config.prefill == "chunked" or (config.prefill == "auto" and on_cpu):
        return None, ()
    if loaded.host_store is None:
        return None, ()
    problem = None
    if model.linear_attention is not None:
        problem = f"{model.architecture}'s recurrent layers cannot be computed apart from decode"
    elif _shares_choices(model):
        problem = f"{model.architecture}'s layers attend what another layer chose"
    if problem is not None:
        if config.prefill == "slp":
            raise ConfigError(f"prefill: slp, but {problem}; use prefill=chunked")
        return None, (f"long prompts are computed in chunks: {problem}",)
    driver = DeviceDriver.for_device(device)
    on_stage("page-locking the experts", 0.0)
    try:
        driver.lock_store(
            loaded.host_store.native,
            lambda done, total: on_stage("page-locking the experts", 100 * done / max(total, 1)),
        )
        available = memory.available_bytes() // 2 if on_cpu else int(free_bytes(device) * _SHARE)
        slp, ring, plan, _ = make_slp(
            loaded,
            model,
            device,
            driver,
            runtime,
            free_bytes=available,
            max_prompt_tokens=layout.max_model_len,
            page_size=layout.page_size,
            pages_per_sequence=layout.pages_per_sequence,
            compute_bytes=2 if config.compute_dtype == "bfloat16" else 4,
        )
    except (CapacityError, CheckpointError, OSError) as error:
        if config.prefill == "slp":
            if isinstance(error, OSError):
                raise CapacityError(f"prefill: slp, but {error}") from None
            raise
        return None, (f"long prompts are computed in chunks: {error}",)
    route = make_route(
        config, model, device, runtime, loaded.host_store, ring, plan.max_tokens, on_stage
    )
    return LongPrompts(PromptStream(slp, caches), route, ring, plan.describe()), ()


def _shares_choices(model: ModelConfig) -> bool:
    """Whether a layer needs more of the one before it than the residual stream."""
    attention = model.attention
    indexer = attention.indexer if isinstance(attention, MlaConfig) else None
    return indexer is not None and bool(indexer.sharing_layers)


def describe_placement(device: Device, long_prompts: LongPrompts | None) -> list[str]:
    """Lines of the start-up report."""
    lines = []
    if device.platform != "cpu":
        lines.append(
            f"device: {device.device_kind}: everything but the routed experts, which the CPU "
            "computes in place"
        )
    if long_prompts is not None:
        route = long_prompts.route
        lines += [f"long prompts: {long_prompts.report}", route.describe()]
        if route.source:
            lines.append(route.source)
    return lines
