"""From options to a running engine: what is cheap to refuse is refused before a weight is read.

Order: configuration, generation defaults, tokenizer and template, the size of the cache; then the
native runtime, the weights, the cache, the compiled step; then the start-up report. What it does
not do: compile (the first step of each shape does, from the cache on disk where there is one).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.hybrid_step import HybridStep
from jaxmoe.engine import calibration, compile_cache
from jaxmoe.engine.async_engine import EngineInfo
from jaxmoe.engine.directory import Directory, model_path, read_directory
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.profile import StepProfile
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.kv_cache import store
from jaxmoe.kv_cache.layout import CacheLayout, plan_cache
from jaxmoe.models import registry
from jaxmoe.models.decoder import cache_spec
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.tokenizer import Tokenizer
from jaxmoe.weights import memory
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

    @property
    def info(self) -> EngineInfo:
        info = self.engine.info(model_path(self.config).resolve().name, self.report)
        return dataclasses.replace(info, store_name=self.loaded.report.shared_name)

    def close(self) -> None:
        """Gives all memory back. Nothing of the engine may be used afterwards."""
        if self.engine.profile is not None:
            self.engine.profile.close()
        if self.engine.grammars is not None:
            self.engine.grammars.close()
        self.step.close()
        self.loaded.close()
        self.runtime.close()


def start(config: EngineConfig, on_stage: OnStage = lambda stage, percent: None) -> Started:
    """Starts the engine that `config` describes; raises ConfigError, CheckpointError,
    CapacityError.

    on_stage: told what is being done and how many percent of it are; from any thread.
    """
    on_stage("reading the configuration", 0.0)
    _log.info("options: %s", config.describe())
    directory = read_directory(model_path(config), dummy=config.load_format == "dummy")
    model_config = directory.model_config
    spec = cache_spec(model_config, config.compute_dtype)
    layout = cache_layout(config, model_config)
    _require_cache_memory(layout)
    programs = compile_cache.enable(config.cache_path)
    runtime = CpuRuntime(num_threads=config.num_threads, isa=config.isa)
    loaded = profile = None
    try:
        if config.profile is not None:
            profile = StepProfile(runtime, config.trace_path)
        loaded = _load(config, directory, runtime, on_stage)
        calibrated = None
        if config.calibrate and loaded.report.expert_bytes >= calibration.LEAST_EXPERT_BYTES:
            on_stage("measuring this machine", 0.0)
            calibrated = calibration.calibrate(runtime, config.cache_path)
        _require_cache_memory(layout)  # again: now the weights have taken theirs
        step = HybridStep(
            loaded.graphdef,
            loaded.state,
            {
                "prefill": NativeOps(runtime, loaded.host_store, "matrix"),
                "decode": NativeOps(runtime, loaded.host_store, "vector"),
            },
            store.allocate(spec, layout.num_pages, layout.page_size),
            page_size=layout.page_size,
            pages_per_sequence=layout.pages_per_sequence,
            num_slots=config.max_num_seqs,
            chunk_tokens=config.prefill_chunk_tokens,
            vocab_size=model_config.vocab_size,
        )
    except BaseException:
        if loaded is not None:
            loaded.close()
        runtime.close()
        raise
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
        counters=runtime.stats,
        profile=profile,
    )
    report = describe(config, directory, layout, loaded, runtime, programs, calibrated)
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
    )


def cache_layout(config: EngineConfig, model_config: ModelConfig) -> CacheLayout:
    """How large the KV cache is with these options; raises ConfigError."""
    return plan_cache(
        token_bytes=store.token_bytes(cache_spec(model_config, config.compute_dtype)),
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        model_limit=model_config.max_position,
        max_model_len=config.max_model_len,
        kv_cache_gb=config.kv_cache_gb,
    )


def _require_cache_memory(layout: CacheLayout) -> None:
    memory.require(
        layout.total_bytes,
        f"a KV cache of {layout.total_tokens} tokens",
        "lower kv_cache_gb or max_model_len",
    )


def _load(
    config: EngineConfig, directory: Directory, runtime: CpuRuntime, on_stage: OnStage
) -> LoadedModel:
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


def describe(
    config: EngineConfig,
    directory: Directory,
    layout: CacheLayout,
    loaded: LoadedModel,
    runtime: CpuRuntime,
    programs: str,
    calibrated: calibration.Calibration | None = None,
) -> str:
    """The start-up report: what runs, where it lies, and what is slower than it could be."""
    model, params = directory.model_config, directory.defaults.params
    experts = model.moe.router
    slower = [*directory.notes, *loaded.report.notes]
    if config.compute_dtype == "float32":
        slower.append("float32 activations and cache: for audits, about half as fast")
    if config.backing == "mmap" and config.load_format != "dummy":
        slower.append("experts mapped from the files: one NUMA node, first use reads the disk")
    if config.profile is not None:
        slower.append("the time of steps is counted (profile), which costs some of it")
    if config.isa is not None:
        slower.append(f"instruction set forced to {config.isa}")
    if not programs:
        slower.append("compiled programs are not kept (cache_dir): every start compiles")
    lines = [
        f"model: {model.architecture} at {directory.path}, {model.num_layers} layers, "
        f"{experts.num_experts} experts of which {experts.experts_per_token} a token, "
        f"{model.quant.format if model.quant.format != 'none' else model.weight_dtype} weights, "
        f"{config.compute_dtype} activations",
        *loaded.report.describe().splitlines(),
        *runtime.describe().splitlines(),
        *([] if calibrated is None else [calibrated.describe()]),
        f"KV cache: {layout.total_tokens} tokens in {layout.num_pages} pages, "
        f"{layout.total_bytes / 2**20:.1f} MiB; up to {config.max_num_seqs} sequences of "
        f"{layout.max_model_len} tokens (the model's limit is {model.max_position})",
        f"sampling defaults: temperature {params.temperature}, top_p {params.top_p}, top_k "
        f"{params.top_k}; end of text: {', '.join(map(str, directory.eos_token_ids)) or 'none'}",
        f"compiled programs: {programs or 'not kept'}",
        *(f"note: {note}" for note in slower),
    ]
    return "\n".join(lines)
