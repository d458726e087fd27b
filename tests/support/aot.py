"""GPU programs compiled on a machine without a GPU, and what can be read off them.

Needs the extra `gpu_aot`: the CUDA plugin and ptxas, but no driver. Weights are shapes only, so a
model of any size compiles. There is no autotuning: the schedule's order, aliasing, copies and
temporaries are what a device would get, the choice among a library's kernels is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode import dual_batch
from jaxmoe.ffi import slot_ring
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.ffi.registry import register_cuda_targets
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.experts import DeviceGroups, ExpertGroup
from jaxmoe.models import registry
from jaxmoe.models.decoder import cache_spec
from jaxmoe.prefill.device import prompt_shape
from jaxmoe.prefill.layer_weights import other_weights, split_layers
from jaxmoe.prefill.plan import SlpPlan, plan_slp
from jaxmoe.prefill.slp import SlpPrefill
from jaxmoe.quant.formats import WeightFormat
from jaxmoe.weights.tensor_table import expert_layouts

ROOT = Path(__file__).parents[2]
TARGETS = {path.stem: path for path in (ROOT / "tests/gpu_aot/targets").glob("*.txtpb")}
PAGE_SIZE = 16
# Arrays from here on are weights, caches or what a prompt streams; below, activations of a step.
LARGE_BYTES = 1 << 20
DECODE_TEMP_BYTES = 64 << 20  # that a decode step of 8 rows may take


class ToolsMissing(Exception):
    """The extra gpu_aot is not installed."""


def find_toolkit() -> Path:
    """The folder of the package nvidia-cuda-nvcc. Raises: ToolsMissing."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / "cu13" / "bin" / "ptxas").exists():
            return Path(folder) / "cu13"
    raise ToolsMissing("no ptxas found in the package nvidia-cuda-nvcc: install the extra gpu_aot")


def prepare_environment() -> None:
    """Before the first program is compiled for a GPU. Raises: ToolsMissing."""
    toolkit = find_toolkit()
    flags = f"--xla_gpu_cuda_data_dir={toolkit} --xla_gpu_autotune_level=0"
    if flags not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        os.environ["PATH"] = f"{toolkit / 'bin'}:{os.environ['PATH']}"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a target: its text as scheduled, and what it says of memory, in bytes on each
    device.
    """

    text: str
    temp: int
    aliased: int
    seconds: float
    arguments: int = 0
    results: int = 0

    @classmethod
    def of(cls, program: Any, seconds: float) -> Compiled:
        """program: what jax compiled."""
        memory = program.memory_analysis()
        return cls(
            program.as_text(),
            memory.temp_size_in_bytes,
            memory.alias_size_in_bytes,
            seconds,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
        )

    def copies_of(self, shapes: set[tuple[str, tuple[int, ...]]]) -> list[str]:
        """Instructions that copy an array of one of these types and shapes."""
        found = []
        for line in self.text.splitlines():
            match = re.search(r"= \(?(\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", line)
            if match:
                dims = tuple(int(d) for d in match[2].split(",") if d)
                if (match[1], dims) in shapes:
                    found.append(line.strip()[:160])
        return found

    def calls(self, pattern: str) -> list[str]:
        """Instructions of the entry computation that match, in the order of the schedule."""
        lines = self.text[self.text.index("\nENTRY") :].splitlines()
        return [line for line in lines if re.search(pattern, line)]


class Target:
    """One kind of GPU, by its GpuTargetConfigProto as text."""

    def __init__(self, path: Path) -> None:
        prepare_environment()
        register_cuda_targets()
        # Programs for devices that are not here cannot be read back from it.
        jax.config.update("jax_enable_compilation_cache", False)
        text = path.read_text()
        self.name = re.search(r'name: "(.*)"', text)[1]
        self.memory_bytes = int(re.search(r"device_memory_size: (\d+)", text)[1])
        self._cores = int(re.search(r"core_count: (\d+)", text)[1])
        self._text = text
        self._device = self.devices(1)[0]

    def devices(self, count: int) -> list[Any]:
        """So many of one host."""
        return list(
            topologies.get_topology_desc(
                platform="cuda", target_config=self._text, topology=f"1x1x{count}"
            ).devices
        )

    @contextlib.contextmanager
    def _mesh(self) -> Iterator[None]:
        """Pallas asks which GPU it is for."""
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType

        device = AbstractDevice(self.name, self._cores, "gpu")
        mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            yield

    def compile(self, program: Any, *args: Any, static: tuple[int, ...] = ()) -> Compiled:
        """program: jitted. args: trees of arrays or shapes, but for those at `static`."""
        sharding = jax.sharding.SingleDeviceSharding(self._device)

        def there(a: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

        args = tuple(a if i in static else jax.tree.map(there, a) for i, a in enumerate(args))
        begin = time.perf_counter()
        with self._mesh():
            done = program.trace(*args).lower(lowering_platforms=("cuda",)).compile()
        return Compiled.of(done, time.perf_counter() - begin)


def hlo_shapes(tree: Any, least_bytes: int = LARGE_BYTES) -> set[tuple[str, tuple[int, ...]]]:
    """Types and shapes of the large arrays in a tree, as HLO writes them."""
    names = {"float8_e4m3fn": "f8e4m3fn", "bfloat16": "bf16", "float32": "f32", "uint8": "u8"}
    names |= {"int32": "s32"}
    return {
        (names[str(a.dtype)], tuple(a.shape))
        for a in jax.tree.leaves(tree)
        if a.size * a.dtype.itemsize >= least_bytes
    }


def tree_bytes(tree: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def bench_config(name: str, layers: int, dense: int = 0) -> ModelConfig:
    """A config of configs/bench with so many layers, the first `dense` without experts."""
    hf = json.loads((ROOT / f"configs/bench/{name}.json").read_text())
    hf["num_hidden_layers"] = layers
    if "layer_types" in hf:
        hf["layer_types"] = hf["layer_types"][:layers]
    if "first_k_dense_replace" in hf:
        hf["first_k_dense_replace"] = dense
    return ModelConfig.from_hf(hf)


def experts_format(config: ModelConfig) -> WeightFormat:
    """As a checkpoint of this configuration has them."""
    return expert_layouts(config, registry.configured_formats(config))[0].format


def abstract_model(config: ModelConfig) -> tuple[Any, Any]:
    """graphdef and a state of shapes."""
    formats = registry.configured_formats(config)
    description = registry.describe_model(config, "bfloat16", formats)
    leaves = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype))
        for path, spec in description.specs.items()
    }
    return description.graphdef, description.fill(leaves)  # pyright: ignore[reportArgumentType]


def abstract_caches(config: ModelConfig, pages: int) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    return [
        tuple(
            jax.ShapeDtypeStruct((pages, PAGE_SIZE, a.num_heads, a.head_dim), a.dtype)
            for a in arrays
        )
        for arrays in cache_spec(config, "bfloat16")
    ]


def abstract_step(tokens: int, rows: int, pages: int) -> StepInputs:
    def whole(*dims: int) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.int32)

    return StepInputs(*[whole(tokens)] * 4, whole(rows, pages))


class AbstractRing:
    """`prefill.slp.LoadingRing` without memory: its events are those of compiled programs."""

    weights = None

    def __init__(self, config: ModelConfig, plan: SlpPlan) -> None:
        shapes = slot_ring.expert_buffers(
            plan.group_experts,
            config.moe.expert_intermediate,
            config.hidden_size,
            experts_format(config),
        )
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        self.groups = [ExpertGroup(*arrays) for _ in range(plan.num_slots)]
        self._ring: Any = SimpleNamespace(id=0)

    def acquire(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return slot_ring.acquire(self._ring, slot, *arrays)

    def release(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return slot_ring.release(self._ring, slot, *arrays)

    def start(self) -> None: ...
    def finish(self) -> None: ...
    def abort(self, cause: str) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass
class PrefillPrograms:
    """The programs of one streamed layer of each kind, as compiled for a target."""

    plan: SlpPlan
    num_groups: int
    chunks: dict[str, Compiled]
    experts: Compiled  # of a MoE layer
    chunk_bytes: int  # of the residual part and the layer's cache, which a chunk updates
    buffer_bytes: int
    weights: set[tuple[str, tuple[int, ...]]]
    caches: set[tuple[str, tuple[int, ...]]]

    def problems(self) -> list[str]:
        """What is not as it must be."""
        found = []
        order = event_order(self.experts)
        want = wanted_events(self.num_groups, self.plan.num_slots)
        if order != want:
            found.append(f"order of the experts' events: {order}, wanted {want}")
        if self.experts.aliased < self.buffer_bytes:
            found.append(f"{self.experts.aliased} bytes of {self.buffer_bytes} stay in place")
        for name, chunk in self.chunks.items():
            if chunk.aliased < self.chunk_bytes:
                found.append(f"{name}: {chunk.aliased} bytes of {self.chunk_bytes} stay in place")
        for name, program in {**self.chunks, "experts": self.experts}.items():
            for line in program.copies_of(self.weights | self.caches):
                found.append(f"{name} copies a weight or the cache: {line}")
            if program.temp > self.plan.activation_bytes:
                found.append(
                    f"{name} takes {program.temp} bytes of temporaries, the plan says "
                    f"{self.plan.activation_bytes} for all activations"
                )
        return found


def event_order(experts: Compiled) -> list[str]:
    """acquire and release with their slots, and "products" with the slot of the acquire before
    where a loop that takes experts' weights lies."""
    order: list[str] = []
    slot = "?"
    # Weights of a group are the only arrays of these types with three dims.
    pattern = r'jaxmoe_slot_(acquire|release)"|= \S.*(f8e4m3fn|u8)\[\d+,\d+,\d+\].* while\('
    for line in experts.calls(pattern):
        event = re.search(r"jaxmoe_slot_(acquire|release)", line)
        if event is None:
            order += [f"products {slot}"] * (order[-1:] != [f"products {slot}"])
            continue
        slot = re.search(r"slot = (\d+)", line)[1]
        order.append(f"{event[1]} {slot}")
    return order


def wanted_events(num_groups: int, num_slots: int) -> list[str]:
    """Of a layer, as `event_order` reads them."""
    events = ("acquire", "products", "release")
    return [f"{event} {g % num_slots}" for g in range(num_groups) for event in events]


def compile_prefill(
    target: Target, config: ModelConfig, tokens: int, free_bytes: int | None = None
) -> PrefillPrograms:
    """config: of a model with layers of each kind, which are compiled once each."""
    graphdef, state = abstract_model(config)
    layout = slot_ring.expert_buffers(
        1, config.moe.expert_intermediate, config.hidden_size, experts_format(config)
    )
    expert_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)
    model: Any = nnx.merge(graphdef, state)
    layers = [layer.leaves for layer in split_layers(model)]
    others = other_weights(layers, tree_bytes(state))
    plan = plan_slp(
        prompt_shape(config, expert_bytes),
        free_bytes or target.memory_bytes * 8 // 10,
        tokens,
        others=others,
    )
    ring = AbstractRing(config, plan)
    pages = tokens // PAGE_SIZE
    slp = SlpPrefill(
        graphdef,
        state,
        lambda context: DeviceOps(None, "prefill", one_sequence=True, context=context),
        ring,
        plan,
        page_size=PAGE_SIZE,
        pages_per_sequence=pages,
        groups=DeviceGroups(plan.window_rows),
        device=jax.devices()[0],
    )
    size, hidden = plan.buffer_tokens(tokens), config.hidden_size
    per_token = config.moe.router.experts_per_token
    part = jax.ShapeDtypeStruct((plan.chunk_tokens, hidden), jnp.float32)
    buffers = (
        jax.ShapeDtypeStruct((size, hidden), jnp.float32),
        jax.ShapeDtypeStruct((size, hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((size, per_token), jnp.int32),
        jax.ShapeDtypeStruct((size, per_token), jnp.float32),
    )
    step = abstract_step(plan.chunk_tokens, 1, pages)
    cache = abstract_caches(config, pages)[0]
    chunks, experts = {}, None
    for kind, leaves in {kind: leaves for kind, leaves in slp._layers}.items():
        name = "chunk of a MoE layer" if kind.is_moe else "chunk of a dense layer"
        args = (kind, tokens, leaves, part, cache, step)
        chunks[name] = target.compile(slp._chunk, *args, static=(0, 1))
        if kind.is_moe:
            slots = tuple(ring.groups)
            biases = leaves if kind.has_biases else []
            experts = target.compile(slp._experts, kind, biases, buffers, slots, static=(0,))
    assert experts is not None
    return PrefillPrograms(
        plan,
        config.moe.router.num_experts // plan.group_experts,
        chunks,
        experts,
        tree_bytes((part, cache)),
        tree_bytes(buffers[:2]),
        hlo_shapes((layers, ring.groups)),
        hlo_shapes(cache),
    )


@dataclasses.dataclass
class DecodeProgram:
    """A decode step of `rows` sequences in `n` microbatches."""

    n: int
    num_dense: int
    num_layers: int
    step: Compiled
    cache_bytes: int
    weights: set[tuple[str, tuple[int, ...]]]
    caches: set[tuple[str, tuple[int, ...]]]

    def problems(self, most_temp_bytes: int) -> list[str]:
        found = []
        calls = [
            f"{kind} {slot}"
            for line in self.step.calls(r'custom_call_target="jaxmoe_experts_(submit|wait)')
            for kind, slot in re.findall(r"jaxmoe_experts_(submit|wait).*slot = (\d)", line)
        ]
        want = wanted_order(self.num_layers - self.num_dense, self.n)
        # The last waits may come in any order.
        last = -self.n
        if calls[:last] != want[:last] or sorted(calls[last:]) != sorted(want[last:]):
            found.append(f"order of the experts' calls: {calls}, wanted {want}")
        if self.step.aliased < self.cache_bytes:
            found.append(f"{self.step.aliased} bytes of {self.cache_bytes} of KV stay in place")
        for line in self.step.copies_of(self.weights | self.caches):
            found.append(f"copies a weight or the cache: {line}")
        if self.step.temp > most_temp_bytes:
            found.append(f"{self.step.temp} bytes of temporaries, wanted at most {most_temp_bytes}")
        return found


def wanted_order(moe_layers: int, n: int) -> list[str]:
    """submit and wait of a step's microbatches (decode/dual_batch.py)."""
    order = []
    for layer in range(moe_layers):
        for slot in range(n):
            order += [f"wait {slot}"] * (layer > 0) + [f"submit {slot}"]
    return order + [f"wait {slot}" for slot in range(n)]


def compile_decode(
    target: Target,
    config: ModelConfig,
    rows: int,
    n: int,
    *,
    pages: int = 4096,
    pages_per_sequence: int = 512,
) -> DecodeProgram:
    """The whole step, all layers, its routed experts on the CPU beside the device."""
    graphdef, state = abstract_model(config)
    caches = abstract_caches(config, pages)
    inputs = abstract_step(rows, rows, pages_per_sequence)
    with CpuRuntime(num_threads=1) as runtime:
        ops = DeviceOps(NativeOps(runtime, SimpleNamespace(id=0), "vector"), "decode")

        def step(state: Any, inputs: StepInputs, caches: Any) -> Any:
            model: Any = nnx.merge(graphdef, state)
            if n == 1:
                return model(inputs, caches, ops, jnp.arange(rows))
            return dual_batch.forward(model, inputs, caches, ops, jnp.arange(rows), n)

        program = jax.jit(step, donate_argnums=2)
        compiled = target.compile(program, state, inputs, caches)
    return DecodeProgram(
        n,
        config.num_layers - len(config.moe_layers),
        config.num_layers,
        compiled,
        tree_bytes(caches),
        hlo_shapes(state),
        hlo_shapes(caches),
    )
