"""From options to a running engine: what is cheap to refuse is refused before a weight is read.

Order: configuration, generation defaults, tokenizer and template, the size of the cache; then the
native runtime, the weights, the cache, the compiled step; then the start-up report. What it does
not do: compile (warm_up.py does, or the first step of each shape, from the cache on disk where
there is one).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import CompressedConfig, ModelConfig
from jaxmoe.decode.batch import PREFILL_SIZES, compiled_ahead, step_shapes
from jaxmoe.decode.hybrid_step import HybridStep
from jaxmoe.engine import calibration, compile_cache, read_ceiling, speculation
from jaxmoe.engine.async_engine import EngineInfo
from jaxmoe.engine.directory import Directory, model_path, read_directory
from jaxmoe.engine.dslp_prompts import add_devices, plan_devices, start_dslp
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.kept_pages import KeptPages
from jaxmoe.engine.long_prompts import (
    LongPrompts,
    describe_placement,
    start_prefill_process,
    start_streaming,
)
from jaxmoe.engine.placement import (
    check_prefill_device,
    choose_device,
    choose_prefill_device,
    device_ops,
    settle_device,
    to_device,
)
from jaxmoe.engine.profile import StepProfile
from jaxmoe.engine.warm_up import WarmUp
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device
from jaxmoe.kv_cache import store
from jaxmoe.kv_cache.layout import CacheLayout, StateLayout, plan_cache, plan_states
from jaxmoe.models import registry
from jaxmoe.models.decoder import cache_spec, state_spec
from jaxmoe.scheduler.tpot_target import TpotTarget
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.tokenizer import Tokenizer
from jaxmoe.weights import memory
from jaxmoe.weights.format_summary import format_summary
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.random_init import random_model
from jaxmoe.weights.safetensors_reader import Checkpoint

_log = logging.getLogger(__name__)
OnStage = Callable[[str, float], None]


@dataclasses.dataclass
class Started:
    """A running engine with everything it stands on. report: the start-up report, for people."""

    engine: Engine
    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    report: str
    step: HybridStep
    loaded: LoadedModel
    runtime: CpuRuntime
    long_prompts: LongPrompts | None = None
    prefill_runtime: CpuRuntime | None = None

    @property
    def info(self) -> EngineInfo:
        info = self.engine.info(model_path(self.config).resolve().name, self.report)
        return dataclasses.replace(info, store_name=self.loaded.report.shared_name)

    def measure_read_ceiling(self) -> None:
        """For servers: what the DRAM delivers, in their metrics."""
        self.engine.set_read_ceiling(read_ceiling.measure(self.runtime))

    def close(self) -> None:
        """Gives all memory back. Nothing of the engine may be used afterwards."""
        if self.engine.warm_up is not None:
            self.engine.warm_up.close()
        if self.engine.profile is not None:
            self.engine.profile.close()
        if self.engine.grammars is not None:
            self.engine.grammars.close()
        if self.long_prompts is not None:
            self.long_prompts.close()
        self.step.close()
        self.loaded.close()
        self.runtime.close()
        if self.prefill_runtime is not None:
            self.prefill_runtime.close()


def start(config: EngineConfig, on_stage: OnStage = lambda stage, percent: None) -> Started:
    """Starts the engine that `config` describes; raises ConfigError, CheckpointError,
    CapacityError.

    on_stage: told what is being done and how many percent of it are; from any thread.
    """
    on_stage("reading the configuration", 0.0)
    _log.info("options: %s", config.describe())
    directory = read_directory(model_path(config), dummy=config.load_format == "dummy")
    device, notes = choose_device(config, directory.model_config)
    directory = speculation.with_draft(config, directory, device)
    model_config = directory.model_config
    spec = cache_spec(model_config, config.compute_dtype)
    layout, states = cache_layout(config, model_config), state_layout(config, model_config)
    _require_cache_memory(layout, states)
    programs = compile_cache.enable(config.cache_path)
    prefill_device, more = choose_prefill_device(config, model_config, device)
    notes += more
    runtime, prefill_runtime = _runtimes(config, device, prefill_device)
    prefill_threads = 0
    if config.disaggregate == "process":
        prefill_threads = max(runtime.num_threads // 2, 1)
        rest = max(runtime.num_threads - prefill_threads, 1)
        runtime.close()
        runtime = CpuRuntime(num_threads=rest, isa=config.isa)
    loaded = long_prompts = profile = None
    try:
        if config.profile is not None and device.platform != "cpu":
            notes += ("profile: steps on a GPU are not split into parts, nothing is counted",)
        elif config.profile is not None:
            profile = StepProfile(runtime, config.trace_path)
        loaded = load_weights(config, directory, runtime, on_stage)
        calibrated = None
        if config.calibrate and loaded.report.expert_bytes >= calibration.LEAST_EXPERT_BYTES:
            on_stage("measuring this machine", 0.0)
            calibrated = calibration.calibrate(runtime, config.cache_path)
        check_prefill_device(prefill_device, loaded.specs)
        device, more = settle_device(config, device, loaded.specs)
        notes += more
        if device.platform == "cpu":
            _require_cache_memory(layout, states)  # again: now the weights have taken theirs
        else:
            on_stage("copying weights to the GPU", 0.0)
            loaded = to_device(loaded, device)
        step = HybridStep(
            loaded.graphdef,
            loaded.state,
            device_ops(device, runtime, loaded),
            store.allocate(
                spec,
                layout.num_pages,
                layout.page_size,
                state_spec(model_config),
                states.num_slots if states is not None else 0,
                device=device,
            ),
            page_size=layout.page_size,
            pages_per_sequence=layout.pages_per_sequence,
            num_slots=config.max_num_seqs,
            chunk_tokens=config.prefill_chunk_tokens,
            vocab_size=model_config.vocab_size,
            device=device,
            has_states=states is not None,
            most_guesses=config.max_draft_tokens if model_config.runs_draft else 0,
        )
        if config.prefill == "dslp":
            long_prompts = start_dslp(
                config, model_config, layout, device, runtime, loaded, lambda: step.caches, on_stage
            )
        elif config.disaggregate == "process":
            long_prompts = start_prefill_process(
                config, model_config, layout, device, prefill_threads, loaded,
                lambda: step.caches, on_stage,
            )  # fmt: skip
        else:
            together, more = plan_devices(
                config, model_config, layout, device, prefill_device, loaded
            )
            notes += more
            long_prompts, more = start_streaming(
                config,
                model_config,
                layout,
                device if prefill_device is None else prefill_device,
                runtime if prefill_runtime is None else prefill_runtime,
                loaded,
                lambda: step.caches,
                on_stage,
                decode_device=None if prefill_device is None else device,
                bounds=None if together is None else together.bounds,
            )
            notes += more
            if together is not None and long_prompts is not None:
                add_devices(
                    long_prompts,
                    together,
                    config,
                    model_config,
                    layout,
                    device,
                    runtime,
                    loaded,
                    on_stage,
                )
        if long_prompts is not None:
            long_prompts.on_compile(lambda begins: step.on_compile(begins))
    except BaseException:
        if long_prompts is not None:
            long_prompts.close()
        if loaded is not None:
            loaded.close()
        runtime.close()
        if prefill_runtime is not None:
            prefill_runtime.close()
        raise
    target = None
    if config.target_tpot_ms is not None:
        sizes = [s for s in PREFILL_SIZES if s < config.prefill_chunk_tokens]
        target = TpotTarget(config.target_tpot_ms / 1e3, [*sizes, config.prefill_chunk_tokens])
    engine = Engine(
        step,
        layout,
        tokenizer=directory.tokenizer,
        vocab_size=model_config.vocab_size,
        eos_token_ids=directory.eos_token_ids,
        max_num_seqs=config.max_num_seqs,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        defaults=directory.defaults,
        seed=config.seed,
        prefix_cache=config.prefix_cache,
        states=states,
        drafts=speculation.make_policy(config, model_config, loaded),
        counters=runtime.stats,
        profile=profile,
        streamer=long_prompts.stream if long_prompts else None,
        route=long_prompts.route if long_prompts else None,
        worker=long_prompts.worker if long_prompts else None,
        target=target,
        keeper=_keeper(config, layout, step),
        throttle=long_prompts.throttle if long_prompts and long_prompts.share < 1 else None,
    )
    if config.warm_up:
        guesses = config.max_draft_tokens if model_config.runs_draft else 0
        chunk = config.prefill_chunk_tokens
        programs_ahead = compiled_ahead(step_shapes(config.max_num_seqs, chunk, guesses), chunk)
        engine.warm_up = WarmUp(
            programs_ahead, lambda program: step.prepare(*program), lambda: engine.has_work
        )
    placed = list(describe_placement(device, long_prompts, prefill_device))
    if target is not None:
        placed.append(target.describe())
    drafting = speculation.describe(config, model_config, loaded)
    if drafting is not None:
        placed.append(drafting)
    if calibrated is not None:
        placed.insert(0, calibrated.describe())
    if engine.warm_up is not None:
        placed.append(engine.warm_up.describe())
    report = describe(
        config, directory, layout, states, loaded, runtime, programs, placed, notes, device
    )
    _log.info("%s", report)
    return Started(
        engine,
        config,
        model_config,
        directory.tokenizer,
        directory.chat_template,
        report,
        step,
        loaded,
        runtime,
        long_prompts,
        prefill_runtime,
    )


def _runtimes(
    config: EngineConfig, device: Device, prefill_device: Device | None
) -> tuple[CpuRuntime, CpuRuntime | None]:
    """The threads, and those of a CPU device that stands in for the GPU which computes prompts:
    half of them, for a GPU would take none.
    """
    gpu = prefill_device if device.platform == "cpu" and prefill_device is not None else device
    threads = num_threads(config.num_threads, gpu)
    if prefill_device is None or prefill_device.platform != "cpu":
        return CpuRuntime(num_threads=threads, isa=config.isa), None
    if threads is None:
        with CpuRuntime() as every_core:
            threads = every_core.num_threads
    prefill = max(threads // 2, 1)
    return (
        CpuRuntime(num_threads=max(threads - prefill, 1), isa=config.isa),
        CpuRuntime(num_threads=prefill, isa=config.isa),
    )


def _keeper(config: EngineConfig, layout: CacheLayout, step: HybridStep) -> KeptPages | None:
    budget = int(config.preempted_kv_gb * 2**30)
    page_bytes = layout.page_size * layout.token_bytes
    return KeptPages(budget, page_bytes, lambda: step.caches) if budget else None


def num_threads(wanted: int | None, device: Device) -> int | None:
    """One core is left for the thread that launches and the one that listens to the GPU."""
    if wanted is not None or device.platform == "cpu":
        return wanted
    with CpuRuntime() as every_core:
        return max(every_core.num_threads - 1, 1)


def cache_layout(config: EngineConfig, model_config: ModelConfig) -> CacheLayout:
    """How large the KV cache is with these options; raises ConfigError."""
    attention = model_config.attention
    if (
        isinstance(attention, CompressedConfig)
        and "sparse" in attention.kinds
        and config.page_size % 4
    ):
        raise ConfigError(
            f"page_size: got {config.page_size}, but {model_config.architecture} keeps an entry "
            "for every 4 positions; use a multiple of 4"
        )
    return plan_cache(
        token_bytes=store.token_bytes(
            cache_spec(model_config, config.compute_dtype), config.page_size
        ),
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        model_limit=model_config.max_position,
        max_model_len=config.max_model_len,
        kv_cache_gb=config.kv_cache_gb,
    )


def state_layout(config: EngineConfig, model_config: ModelConfig) -> StateLayout | None:
    """The slots of recurrent state with these options; None for a model without."""
    return plan_states(
        slot_bytes=store.slot_bytes(state_spec(model_config)),
        max_num_seqs=config.max_num_seqs,
        prefix_cache=config.prefix_cache,
        state_cache_gb=config.state_cache_gb,
    )


def _require_cache_memory(layout: CacheLayout, states: StateLayout | None) -> None:
    nbytes, what = layout.total_bytes, f"a KV cache of {layout.total_tokens} tokens"
    advice = "lower kv_cache_gb or max_model_len"
    if states is not None:
        nbytes += states.total_bytes
        what += f" and {states.num_slots} recurrent states"
        advice += ", or max_num_seqs or state_cache_gb"
    memory.require(nbytes, what, advice)


def load_weights(
    config: EngineConfig, directory: Directory, runtime: CpuRuntime, on_stage: OnStage
) -> LoadedModel:
    """The checkpoint's, or random ones."""
    progress = None if config.show_progress else False
    if config.load_format == "dummy":
        return random_model(
            directory.model_config,
            registry,
            runtime,
            compute_dtype=config.compute_dtype,
            seed=config.seed,
            progress=progress,
        )
    on_stage("loading weights", 0.0)
    with Checkpoint.open(directory.path) as checkpoint:
        return load_model(
            checkpoint,
            directory.model_config,
            registry,
            runtime,
            compute_dtype=config.compute_dtype,
            backing="mmap" if config.backing == "mmap" else "arena",
            shared=bool(config.shared_weights),
            progress=progress,
            on_percent=lambda percent: on_stage("loading weights", percent),
        )


def _describe_memory(layout: CacheLayout, states: StateLayout | None, loaded: LoadedModel) -> str:
    """What this start holds, beside what is free now; the plan before a start is plan.py's."""
    report, room = loaded.report, min(memory.rooms(), key=lambda room: room.free_bytes)
    weights, cache = report.expert_bytes + report.leaf_bytes, layout.total_bytes
    more = "" if states is None else f", recurrent states {memory.gib(states.total_bytes)}"
    return (
        f"memory: weights {memory.gib(weights)}, KV cache {memory.gib(cache)}{more}; this process "
        f"{memory.gib(memory.peak_rss_bytes())} at the peak so far, steps to compile not counted "
        f"(--plan_only counts them); {memory.gib(room.free_bytes)} left of {room.source}"
    )


def _describe_decode(device: Device | None) -> str:
    if device is None or device.platform == "cpu":
        why = "without a GPU attention and experts need the same cores"
    else:
        why = "what it costs on this machine is not calibrated yet"
    return f"decode: merged; overlapping two halves of a batch is off: {why}"


def describe(
    config: EngineConfig,
    directory: Directory,
    layout: CacheLayout,
    states: StateLayout | None,
    loaded: LoadedModel,
    runtime: CpuRuntime,
    programs: str,
    placement: Sequence[str] = (),
    notes: Sequence[str] = (),
    device: Device | None = None,
) -> str:
    """The start-up report: what runs, where it lies, and what is slower than it could be."""
    model, params = directory.model_config, directory.defaults.params
    experts = model.moe.router
    slower = [*directory.notes, *loaded.report.notes, *notes]
    if config.compute_dtype == "float32":
        slower.append("float32 activations and cache: for audits, about half as fast")
    if config.backing == "mmap" and config.load_format != "dummy":
        slower.append("experts mapped from the files: one NUMA node, first use reads the disk")
    if config.profile is not None:
        slower.append("the time of steps is counted (profile), which costs some of it")
    if states is not None and config.prefix_cache and states.num_kept == 0:
        slower.append(
            "prefix cache off: state_cache_gb holds no recurrent state of "
            f"{states.slot_bytes / 2**20:.1f} MiB, so every prompt is computed whole"
        )
    if config.isa is not None:
        slower.append(f"instruction set forced to {config.isa}")
    if not programs:
        slower.append("compiled programs are not kept (cache_dir): every start compiles")
    layouts = () if loaded.host_store is None else loaded.host_store.layouts
    lines = [
        f"model: {model.architecture} at {directory.path}, {model.num_layers} layers, "
        f"{experts.num_experts} experts of which {experts.experts_per_token} a token, "
        f"{format_summary(loaded.specs, layouts)}, {config.compute_dtype} activations",
        *loaded.report.describe().splitlines(),
        *runtime.describe().splitlines(),
        *placement,
        f"KV cache: {layout.total_tokens} tokens in {layout.num_pages} pages, "
        f"{layout.total_bytes / 2**20:.1f} MiB; up to {config.max_num_seqs} sequences of "
        f"{layout.max_model_len} tokens (the model's limit is {model.max_position})",
        _describe_memory(layout, states, loaded),
        _describe_decode(device),
        *_describe_states(states),
        f"sampling defaults: temperature {params.temperature}, top_p {params.top_p}, top_k "
        f"{params.top_k}; end of text: {', '.join(map(str, directory.eos_token_ids)) or 'none'}",
        f"compiled programs: {programs or 'not kept'}",
        *(f"note: {note}" for note in slower),
    ]
    return "\n".join(lines)


def _describe_states(states: StateLayout | None) -> list[str]:
    if states is None:
        return []
    return [
        f"recurrent states: {states.slot_bytes / 2**20:.1f} MiB each, {states.num_running} for "
        f"running sequences and {states.num_kept} for the prefix cache, "
        f"{states.total_bytes / 2**20:.1f} MiB"
    ]
