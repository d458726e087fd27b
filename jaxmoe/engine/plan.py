"""The memory a start would take, before it takes it: config.json, safetensors headers and options.

No weight is read and no program compiled. Weights and KV cache are exact. What the process itself
takes (Python, jax, the tokenizer) is measured in the process that plans, which has loaded the same.
What compiled programs and steps take is estimated from the constants below, which
tests/engine/test_plan.py holds against real processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import CompressedConfig, MlaConfig, ModelConfig
from jaxmoe.decode.batch import compiled_ahead, step_shapes
from jaxmoe.engine.directory import Directory, model_path, read_directory
from jaxmoe.engine.gpu_plan import GpuPlan, plan_gpu
from jaxmoe.engine.memory_plan import Change, Item, MemoryPlan, peak_bytes
from jaxmoe.engine.placement import check_leaves, choose_device, unsupported
from jaxmoe.engine.speculation import with_draft
from jaxmoe.engine.start import cache_layout, state_layout
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.models import registry
from jaxmoe.weights import memory
from jaxmoe.weights.format_summary import format_summary
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.loader import leaf_bytes, plan_load
from jaxmoe.weights.param_spec import ParamSpec
from jaxmoe.weights.read_pool import default_threads
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.tensor_table import expert_layouts

# Growth of resident memory over a start without compiled programs on disk, measured on models of 3
# to 16 layers with 6 and 12 programs (jax 0.10). Starts that find their programs on disk take less.
COMPILER_BYTES = 180 << 20  # pages of jaxlib and LLVM that compiling touches, threads, jax's caches
PROGRAM_BYTES = 11 << 20
GQA_LAYER_BYTES = 1_800_000  # of every program
MLA_LAYER_BYTES = 3_000_000  # its text is longer


@dataclasses.dataclass(frozen=True)
class WeightSizes:
    """Bytes of a checkpoint in memory. mapped: the part of `experts` that backing="mmap" leaves in
    the files. transient: see `LoadPlan`. formats: how the weights are held, in words. notes: what
    the checkpoint has to say of itself. layouts, specs: of the experts, and of all other weights.
    """

    experts: int
    mapped: int
    others: int
    transient: int
    formats: str = ""
    notes: tuple[str, ...] = ()
    layouts: tuple[ExpertLayout, ...] = ()
    specs: Mapping[str, ParamSpec] = dataclasses.field(default_factory=dict)


def make_plan(config: EngineConfig, gpu_memory_gb: float | None = None) -> MemoryPlan:
    """What `start(config)` would take. Raises what it would: ConfigError, CheckpointError.

    gpu_memory_gb: of a GPU that is not here, in GiB; by default that of the one that the start
    would use, if any.
    """
    jax.local_devices(backend="cpu")  # so that what is measured below is there
    directory = read_directory(model_path(config), dummy=config.load_format == "dummy")
    if config.speculative != "off":
        device, _ = choose_device(config, directory.model_config)
        directory = with_draft(config, directory, device)
    sizes = weight_sizes(config, directory)
    own = memory.anonymous_bytes()
    process = memory.peak_rss_bytes()
    layout = cache_layout(config, directory.model_config)
    items = _items(config, directory.model_config, sizes, layout, process)
    # This process ends before the real one starts, so its own memory is free by then.
    rooms = tuple(room._replace(free_bytes=room.free_bytes + own) for room in memory.rooms())
    room_bytes = min(room.free_bytes for room in rooms)
    mapped = sizes.mapped if _is_mapped(config) else 0
    return MemoryPlan(
        model=_describe(directory, sizes.formats),
        items=items,
        rooms=rooms,
        changes=_changes(config, directory.model_config, sizes, layout, process, room_bytes),
        reclaimable_bytes=mapped,
        notes=(*directory.notes, *sizes.notes),
        gpu=_gpu_plan(config, directory.model_config, sizes, layout, gpu_memory_gb),
    )


def _gpu_plan(
    config: EngineConfig,
    model: ModelConfig,
    sizes: WeightSizes,
    layout: CacheLayout,
    gpu_memory_gb: float | None,
) -> GpuPlan | None:
    if gpu_memory_gb is not None:
        memory_bytes = int(gpu_memory_gb * 2**30)
    else:
        device, _ = choose_device(config, model)
        if device.platform == "cpu":
            return None
        memory_bytes = DeviceDriver.for_device(device).memory_info()[1]
    problem = unsupported(model, config) or check_leaves(sizes.specs)
    if problem is not None:
        raise ConfigError(f"gpu_memory_gb: {problem}; plan without a GPU")
    if not sizes.layouts:
        raise ConfigError("gpu_memory_gb: a model without routed experts; plan without a GPU")
    return plan_gpu(config, model, layout, sizes.layouts, sizes.specs, memory_bytes)


def weight_sizes(config: EngineConfig, directory: Directory) -> WeightSizes:
    """From the headers of the checkpoint, which must be the model's; of random weights from
    config.json.
    """
    model = directory.model_config
    if config.load_format == "dummy":
        formats = registry.configured_formats(model)
        specs = registry.describe_model(model, config.compute_dtype, formats).specs
        layouts = expert_layouts(model, formats)
        experts = sum(layout.total_bytes for layout in layouts)
        others = sum(map(leaf_bytes, specs.values()))
        summary = format_summary(specs, layouts)
        return WeightSizes(experts, 0, others, 0, summary, (), tuple(layouts), specs)
    with Checkpoint.open(directory.path) as checkpoint:
        load = plan_load(checkpoint, model, registry, config.compute_dtype, default_threads())
    mapped = sum(matrix.weight.nbytes for matrix in load.table.matrices)
    return WeightSizes(
        load.expert_bytes,
        mapped,
        load.leaf_bytes,
        load.transient_bytes,
        format_summary(load.description.specs, load.table.layouts),
        checkpoint.notes,
        tuple(load.table.layouts),
        load.description.specs,
    )


def _is_mapped(config: EngineConfig) -> bool:
    return config.backing == "mmap" and config.load_format != "dummy"


def _items(
    config: EngineConfig,
    model: ModelConfig,
    sizes: WeightSizes,
    layout: CacheLayout,
    process_bytes: int,
) -> tuple[Item, ...]:
    experts = sizes.experts - (sizes.mapped if _is_mapped(config) else 0)
    guesses = config.max_draft_tokens if model.runs_draft else 0
    chunk = config.prefill_chunk_tokens
    shapes = step_shapes(config.max_num_seqs, chunk, guesses)
    count = len(compiled_ahead(shapes, chunk)) if config.warm_up else len(shapes)
    layer_bytes = MLA_LAYER_BYTES if isinstance(model.attention, MlaConfig) else GQA_LAYER_BYTES
    programs = COMPILER_BYTES + count * (PROGRAM_BYTES + layer_bytes * model.num_held_layers)
    kv = (
        f"{layout.total_tokens} tokens, {config.max_num_seqs} sequences of up to "
        f"{layout.max_model_len}"
    )
    states = state_layout(config, model)
    recurrent = []
    if states is not None:
        note = f"{states.num_running} of sequences, {states.num_kept} of the prefix cache"
        recurrent = [Item("recurrent states", states.total_bytes, note, when="running")]
    return (
        Item("routed experts", experts, f"{config.load_format}, {config.backing}"),
        Item("other weights", sizes.others),
        Item("the process", process_bytes, "Python, jax, tokenizer: measured here"),
        Item("conversion of weights", sizes.transient, when="loading"),
        Item("KV cache", layout.total_bytes, kv, when="running"),
        *recurrent,
        Item("step workspace", step_bytes(config, model), "estimated", when="running"),
        Item("compiling", programs, f"estimated, {count} programs", when="running"),
    )


def step_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Activations of the largest step: XLA's temporaries and the kernels' scratch."""
    tokens, hidden = config.prefill_chunk_tokens, model.hidden_size
    # Of every token and expert: stage 1 in float32, and the inputs of both stages as kernels want.
    pair_bytes = 8 * model.moe.expert_intermediate + 2 * hidden
    scratch = tokens * model.moe.router.experts_per_token * pair_bytes
    if model.linear_attention is not None:  # convolved inputs, held by the operation
        scratch += 6 * tokens * model.linear_attention.conv_channels
    logits = 4 * config.max_num_seqs * model.vocab_size
    # Logits as they are, adjusted, sorted, and what is drawn from.
    return temporary_bytes(tokens, model) + scratch + 4 * logits


def temporary_bytes(tokens: int, model: ModelConfig) -> int:
    """What XLA holds beside its arguments in a prefill of `tokens`, to within 10 % of its own
    account at the dimensions of configs/bench.
    """
    attention = model.attention
    if isinstance(attention, MlaConfig):  # absorbed queries, and the latents they attend to
        latent = 2 * attention.kv_lora_rank + attention.rope_head_dim
        floats = attention.num_heads * latent
    elif isinstance(attention, CompressedConfig):
        # Queries before and after they turn, what they attend to, and the streams beside them.
        floats = 4 * attention.num_heads * attention.head_dim
        if model.streams is not None:
            floats += 4 * model.streams.count * model.hidden_size
    else:  # queries, what they attend to, keys and values
        floats = (2 * attention.num_heads + attention.num_kv_heads) * attention.head_dim
    linear = model.linear_attention
    if linear is not None:  # queries, keys, values and gates before and after they are sorted
        floats = max(floats, 2 * (linear.conv_channels + linear.value_row))
    return 4 * tokens * (12 * model.hidden_size + floats)


def _changes(
    config: EngineConfig,
    model: ModelConfig,
    sizes: WeightSizes,
    layout: CacheLayout,
    process_bytes: int,
    room_bytes: int,
) -> tuple[Change, ...]:
    """Options that need less memory, each alone and at the gentlest value that helps."""
    items = _items(config, model, sizes, layout, process_bytes)
    need = peak_bytes(items)
    out: list[Change] = []

    def offer(flag: str, cost: str, **options: object) -> None:
        try:
            other = EngineConfig.of({n: getattr(config, n) for n in _OPTIONS} | options)
            other_layout = cache_layout(other, model)
        except ConfigError:
            return
        peak = peak_bytes(_items(other, model, sizes, other_layout, process_bytes))
        if peak < need:
            out.append(Change(flag, peak, cost))

    if need <= room_bytes:
        return ()
    kv_bytes = max(layout.total_bytes - (need - room_bytes), 0)
    one_bytes = layout.pages_per_sequence * layout.page_size * layout.token_bytes
    if kv_bytes >= one_bytes:
        gb = _rounded_down_gb(kv_bytes)
        cost = f"{int(gb * 2**30) // layout.token_bytes} tokens in all sequences together"
        offer(f"--kv_cache_gb={gb:g}", cost, kv_cache_gb=gb)
    else:
        tokens = max(kv_bytes // layout.token_bytes, _SHORTEST)
        gb = _rounded_down_gb(tokens * layout.token_bytes + (1 << 20))
        # Whole pages must fit into the rounded size.
        fitting = int(gb * 2**30) // layout.token_bytes // layout.page_size * layout.page_size
        length = min(tokens, fitting)
        offer(
            f"--max_model_len={length} --kv_cache_gb={gb:g}",
            "one conversation at a time, and a shorter one",
            max_model_len=length,
            kv_cache_gb=gb,
        )
    if config.load_format != "dummy" and config.backing == "arena":
        cost = "experts are paged from the files as they are used, which is far slower"
        offer("--backing=mmap", cost, backing="mmap")
    if config.prefill_chunk_tokens > _SMALL_CHUNK:
        cost = "prompts are read more slowly"
        offer(f"--prefill_chunk_tokens={_SMALL_CHUNK}", cost, prefill_chunk_tokens=_SMALL_CHUNK)
    return tuple(out)


_SHORTEST = 256  # tokens: a context nobody would want less of
_SMALL_CHUNK = 128  # still many rows a weight read from memory


def _rounded_down_gb(nbytes: int) -> float:
    return math.floor(nbytes / 2**30 * 1000) / 1000


_OPTIONS = tuple(field.name for field in dataclasses.fields(EngineConfig))


def _describe(directory: Directory, formats: str) -> str:
    model = directory.model_config
    return (
        f"{model.architecture} at {directory.path}: {model.num_layers} layers, "
        f"{model.moe.router.num_experts} experts, {formats}"
    )
