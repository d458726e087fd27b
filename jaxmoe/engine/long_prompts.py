"""Stream-loading prefill in an engine: when it is there, what it takes, which prompts get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from jaxmoe.common.errors import CapacityError, CheckpointError, ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import CompressedConfig, MlaConfig, ModelConfig
from jaxmoe.engine.machine_rates import KnownRates
from jaxmoe.engine.placement import free_bytes
from jaxmoe.engine.prefill_worker import PrefillWorker
from jaxmoe.engine.prompt_rates import make_route
from jaxmoe.engine.remote_prefill import RemotePrefill
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.kv_cache import store
from jaxmoe.kv_cache.handoff import Cache
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.kv_cache.shared_pages import SharedPages
from jaxmoe.models.decoder import cache_spec
from jaxmoe.prefill.device import make_slp
from jaxmoe.prefill.plan import RingBounds, Weights
from jaxmoe.prefill.stream import PromptStream
from jaxmoe.scheduler.prefill_route import PrefillRoute
from jaxmoe.weights import memory
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.memory import gib

WEIGHTS: dict[str, Weights] = {"auto": "auto", "resident": "resident", "streamed": "streamed"}
# Of what XLA may take: the rest is for programs' temporaries outside the plan.
SHARE = 0.9


class Paced(Protocol):
    """What streams the experts, as far as the throttle needs it: a ring, or several."""

    @property
    def total_bytes(self) -> int: ...
    def set_pace(self, bytes_per_s: float) -> None: ...


@dataclasses.dataclass
class LongPrompts:
    """What computes them, a stream between the steps or a worker beside them (of this process, or
    one of its own), with its rings and the route; `close` gives the device's memory back.

    rings: with the bytes per second of each alone. share: of that, what it may take while others
    decode. known: the machine's rates, where they were asked for.
    """

    stream: PromptStream | None
    worker: PrefillWorker | RemotePrefill | None
    route: PrefillRoute
    rings: list[tuple[Paced, float]]
    report: str
    share: float = 1.0
    known: KnownRates | None = None

    def throttle(self, decoding: bool) -> None:
        """Whether others decode now, which streaming is to leave bandwidth to."""
        for ring, rate in self.rings:
            ring.set_pace(self.share * rate if decoding else 0.0)
        self.route.copy_share = self.share if decoding else 1.0

    def on_compile(self, call: Callable[[bool], None]) -> None:
        """Whom to tell when programs are compiled that the steps wait for, and when they are."""
        if self.stream is not None:
            self.stream.on_compile(call)

    def close(self) -> None:
        for part in (self.stream, self.worker):
            if part is not None:
                part.close()


def start_streaming(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    device: Device,
    runtime: CpuRuntime,
    loaded: LoadedModel,
    caches: Callable[[], list[tuple[jax.Array, ...]]],
    on_stage: Callable[[str, float], None] = lambda stage, percent: None,
    *,
    decode_device: Device | None = None,
    bounds: RingBounds | None = None,
    make_worker: Callable[[Any, list[Cache]], Any] | None = None,
) -> tuple[LongPrompts | None, tuple[str, ...]]:
    """None where prompts are computed in chunks only: without a GPU, unless asked for. And notes
    for the start-up report.

    device, runtime: that prompts are streamed to. decode_device: that `loaded` and `caches` are on,
    where that is another one: a worker computes them beside decode then. bounds: of the ring, where
    it is not for this alone. make_worker: of the programs and their own pages, where it is to be
    another one than `PrefillWorker`.

    Raises: CapacityError, CheckpointError where `prefill="slp"` or `disaggregate="on"` cannot be.
    """
    aside = decode_device is not None
    wanted = None
    if aside:
        wanted = f"disaggregate: {config.disaggregate}"
    elif config.prefill == "slp":
        wanted = "prefill: slp"
    if config.prefill == "chunked" or (wanted is None and not has_bus(config, device)):
        return None, ()
    host_store = loaded.host_store
    if host_store is None:
        return None, ()
    problem = None
    if model.linear_attention is not None:
        problem = f"{model.architecture}'s recurrent layers cannot be computed apart from decode"
    elif isinstance(model.attention, CompressedConfig):
        problem = f"{model.architecture}'s open entries cannot be computed apart from decode"
    elif _shares_choices(model):
        problem = f"{model.architecture}'s layers attend what another layer chose"
    if problem is not None:
        if wanted is not None:
            raise ConfigError(f"{wanted}, but {problem}; use prefill=chunked, disaggregate=off")
        return None, (f"long prompts are computed in chunks: {problem}",)
    driver = driver_of(config, device)
    own: list[Cache] = []
    on_stage("page-locking the experts", 0.0)
    try:
        driver.lock_store(
            host_store.native,
            lambda done, total: on_stage("page-locking the experts", 100 * done / max(total, 1)),
        )
        weights: Weights | None = None
        if aside:
            weights = WEIGHTS[config.prefill_weights]
            own = _own_pages(config, model, layout, device)
            loaded = _in_host_memory(loaded, decode_device)
        slp, ring, plan, _ = make_slp(
            loaded,
            model,
            device,
            driver,
            runtime,
            free_bytes=room_for_streaming(device),
            max_prompt_tokens=layout.max_model_len,
            page_size=layout.page_size,
            pages_per_sequence=layout.pages_per_sequence,
            compute_bytes=2 if config.compute_dtype == "bfloat16" else 4,
            weights=weights,
            bounds=bounds,
        )
    except (CapacityError, CheckpointError, OSError) as error:
        if wanted is not None:
            if isinstance(error, OSError):
                raise CapacityError(f"{wanted}, but {error}") from None
            raise
        return None, (f"long prompts are computed in chunks: {error}",)
    assert loaded.host_store is not None
    route, known = make_route(
        config, model, device, runtime, host_store, ring, plan.max_tokens, on_stage
    )
    stream = worker = None
    if decode_device is None:
        stream = PromptStream({"slp": slp}, caches)
    elif make_worker is not None:
        worker = make_worker(slp, own)
    else:
        worker = PrefillWorker(slp, own, caches, device, decode_device, page_size=layout.page_size)
    rings: list[tuple[Paced, float]] = [(ring, ring.total_bytes / route.pass_s)]
    share = config.prefill_bandwidth_share
    return LongPrompts(stream, worker, route, rings, plan.describe(), share, known), ()


def start_prefill_process(
    config: EngineConfig,
    model: ModelConfig,
    layout: CacheLayout,
    device: Device,
    num_threads: int,
    loaded: LoadedModel,
    caches: Callable[[], list[Cache]],
    on_stage: Callable[[str, float], None] = lambda stage, percent: None,
) -> LongPrompts:
    """For `disaggregate="process"`: a process with so many threads computes long prompts while
    `device` decodes.

    Raises: CapacityError, ConfigError where it cannot be.
    """
    store_name = loaded.report.shared_name
    if store_name is None:
        if not config.shared_weights:
            raise ConfigError(
                "disaggregate: process wants the experts in named shared memory; use "
                "shared_weights=true, or disaggregate=on or off"
            )
        raise CapacityError(
            f"disaggregate: process, but {'; '.join(loaded.report.notes) or 'nothing is shared'}; "
            "use disaggregate=on or off"
        )
    spec = cache_spec(model, config.compute_dtype)
    pages = layout.pages_per_sequence * layout.page_size * layout.token_bytes
    memory.require(pages, "the pages shared with the prefill process", "disaggregate=off")
    shared = SharedPages.create(spec, layout.pages_per_sequence, layout.page_size)
    try:
        worker = RemotePrefill(
            config, num_threads, shared, caches, device, store_name,
            lambda stage, percent: on_stage(f"the prefill process: {stage}", percent),
        )  # fmt: skip
    except BaseException:
        shared.close()
        raise
    ready = worker.ready
    forced = "slp" if config.prefill == "slp" else None
    rates = ready.pass_s, ready.streamed_token_s, ready.chunked_token_s
    route = PrefillRoute(*rates, ready.max_tokens, forced=forced, source=ready.source)

    def on_usable(usable: bool) -> None:
        route.forced = forced if usable else "chunked"

    worker.on_usable = on_usable
    rings: list[tuple[Paced, float]] = [(worker, ready.total_bytes / ready.pass_s)]
    return LongPrompts(None, worker, route, rings, ready.report, config.prefill_bandwidth_share)


def has_bus(config: EngineConfig, device: Device) -> bool:
    """Whether streaming is considered unasked: there is a GPU, or something stands in for one."""
    return device.platform != "cpu" or config.stand_in_copy_gb_s is not None


def driver_of(config: EngineConfig, device: Device) -> DeviceDriver:
    if device.platform == "cpu" and config.stand_in_copy_gb_s is not None:
        return DeviceDriver.host(config.stand_in_copy_gb_s * 1e9)
    return DeviceDriver.for_device(device)


def room_for_streaming(device: Device) -> int:
    """Bytes of the device's memory that a plan may use."""
    if device.platform == "cpu":
        return memory.available_bytes() // 2
    return int(free_bytes(device) * SHARE)


def _shares_choices(model: ModelConfig) -> bool:
    """Whether a layer needs more of the one before it than the residual stream."""
    attention = model.attention
    indexer = attention.indexer if isinstance(attention, MlaConfig) else None
    return indexer is not None and bool(indexer.sharing_layers)


def _own_pages(
    config: EngineConfig, model: ModelConfig, layout: CacheLayout, device: Device
) -> list[tuple[jax.Array, ...]]:
    """Of a device that computes prompts beside decode: pages for one sequence.

    Raises: CapacityError.
    """
    pages = layout.pages_per_sequence * layout.page_size * layout.token_bytes
    if device.platform == "cpu":
        memory.require(pages, "the prefill worker's pages", "disaggregate=off")
    elif pages > free_bytes(device):
        raise CapacityError(
            f"the prefill worker's pages take {gib(pages)}, and {device.device_kind} has "
            f"{gib(free_bytes(device))} free; lower max_model_len or use disaggregate=off"
        )
    return store.allocate(
        cache_spec(model, config.compute_dtype),
        layout.pages_per_sequence,
        layout.page_size,
        device=device,
    )


def _in_host_memory(loaded: LoadedModel, device: Device | None) -> LoadedModel:
    """The weights but for the routed experts where a second device can take them from, all at once
    or in a stream: there they are already, unless they were moved to `device`.

    Raises: CapacityError.
    """
    if device is None or device.platform == "cpu":
        return loaded
    nbytes = sum(leaf.nbytes for leaf in loaded.leaves)
    memory.require(nbytes, "the prefill worker's weights in host memory", "disaggregate=off")
    host = jax.local_devices(backend="cpu")[0]
    return dataclasses.replace(loaded, state=jax.device_put(loaded.state, host))


def _name(device: Device) -> str:
    return f"{device.platform}:{device.id}"


def describe_placement(
    device: Device, long_prompts: LongPrompts | None, prefill_device: Device | None = None
) -> list[str]:
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
        if isinstance(long_prompts.worker, RemotePrefill):
            lines.append(
                f"long prompts are computed by process {long_prompts.worker.pid} on the same copy "
                f"of the experts while {_name(device)} decodes; their pages are handed over layer "
                "by layer through shared memory"
            )
        elif prefill_device is not None:
            lines.append(
                f"long prompts are computed on {_name(prefill_device)} while {_name(device)} "
                "decodes; their pages are handed over layer by layer"
            )
        else:
            lines.append("long prompts and decode take turns, a layer at a time")
        if long_prompts.share < 1:
            rates = [long_prompts.share * rate / 1e9 for _, rate in long_prompts.rings]
            paces = " or ".join(f"{rate:.3g}" for rate in rates)
            lines.append(
                f"while others decode, experts stream at {paces} GB/s at most "
                "(prefill_bandwidth_share)"
            )
    return lines
