"""Programs of a prompt on several GPUs (prefill/dslp.py) compiled on a machine without one.

What can be read off them: collectives and their bytes, copies, the ring's events, memory.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxmoe.attention.zigzag import Cut, chunk_length
from jaxmoe.common.collectives import count_arrays, exchanged_bytes
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi import slot_ring
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.experts import DeviceGroups, ExpertGroup
from jaxmoe.kernels.partial_attention import DeviceParts
from jaxmoe.kv_cache import store
from jaxmoe.models.decoder import cache_spec
from jaxmoe.moe.small_ep import AllToAll, SmallEp, most_experts
from jaxmoe.prefill.device import prompt_shape
from jaxmoe.prefill.dslp import DslpPrefill, _Prompt
from jaxmoe.prefill.dslp_plan import DslpPlan, plan_dslp
from jaxmoe.prefill.layer_kinds import LayerKind
from jaxmoe.prefill.rank_rings import rank_mesh
from support import aot

Shapes = set[tuple[str, tuple[int, ...]]]


class AbstractRings(aot.AbstractRing):
    """`prefill.rank_rings.RankRings` without memory: the ranks' slots as one array each."""

    def __init__(self, config: ModelConfig, plan: DslpPlan, sharding: NamedSharding) -> None:
        super().__init__(config, plan.rank)
        own: list[Any] = self.groups
        self.groups = [
            ExpertGroup(
                *(
                    jax.ShapeDtypeStruct(
                        (plan.num_ranks * a.shape[0], *a.shape[1:]), a.dtype, sharding=sharding
                    )
                    for a in group.arrays
                )
            )
            for group in own
        ]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of one program. sends: by kind of collective, how many arrays go, and their bytes.

    inplace: bytes of activations or of the cache that it updates. fixed: bytes of its arguments on
    a device that are no activations: weights, slots, the cache. beside: bytes of activations on a
    device while it runs that it neither takes nor gives.
    """

    sends: dict[str, tuple[int, int]]
    inplace: int
    fixed: int
    beside: int


@dataclasses.dataclass
class DslpPrograms:
    """By name, as compiled for a target."""

    plan: DslpPlan  # made for SmallEP
    exchange: str
    num_experts: int  # of a rank
    programs: dict[str, aot.Compiled]
    expected: dict[str, Expected]
    weights: Shapes
    caches: Shapes

    @property
    def planned_bytes(self) -> int:
        return self.plan.rank.activation_bytes + self.plan.exchange_bytes

    def most_bytes(self, name: str) -> int:
        """Of activations on a device while the program runs."""
        program = self.programs[name]
        own = program.arguments + program.results - program.aliased + program.temp
        return own - self.expected[name].fixed + self.expected[name].beside

    def sends(self, name: str) -> dict[str, tuple[int, int]]:
        """By kind of collective, how many arrays a device sends, and their bytes."""
        text = self.programs[name].text
        nbytes = exchanged_bytes(text, self.plan.num_ranks)
        return {kind: (n, nbytes[kind]) for kind, n in count_arrays(text).items()}

    def problems(self) -> list[str]:
        """What is not as it must be."""
        found = []
        for name, program in self.programs.items():
            expected = self.expected[name]
            if self.sends(name) != expected.sends:
                found.append(
                    f"{name} sends (arrays, bytes) {self.sends(name)}, wanted {expected.sends}"
                )
            for line in program.copies_of(self.weights | self.caches):
                found.append(f"{name} copies a weight or the cache: {line}")
            if program.aliased < expected.inplace:
                found.append(f"{name}: {program.aliased} bytes of {expected.inplace} stay in place")
            if self.exchange == "small_ep" and self.most_bytes(name) > self.planned_bytes:
                found.append(
                    f"{name} has {self.most_bytes(name)} bytes of activations on a device, the "
                    f"plan says {self.planned_bytes}"
                )
        rank = self.plan.rank
        want = aot.wanted_events(self.num_experts // rank.group_experts, rank.num_slots)
        for name, program in self.programs.items():
            if name.startswith("experts") and aot.event_order(program) != want:
                found.append(f"{name}: events {aot.event_order(program)}, wanted {want}")
        return found


def compile_dslp(
    target: aot.Target,
    config: ModelConfig,
    tokens: int,
    *,
    num_ranks: int = 2,
    prefix: int = 0,
    exchange: str = "small_ep",
    free_bytes: int | None = None,
    only: tuple[str, ...] | None = None,
) -> DslpPrograms:
    """config: of a model with layers of each kind. prefix: positions that are cached already. only:
    first words of the programs to compile; None: all of a prompt's.
    """
    devices = target.devices(num_ranks)
    mesh = rank_mesh(devices)
    sharded, whole = (
        NamedSharding(mesh, PartitionSpec("rank")),
        NamedSharding(mesh, PartitionSpec()),
    )
    home = SingleDeviceSharding(devices[0])

    def placed(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    graphdef, state = aot.abstract_model(config)
    layout = slot_ring.expert_buffers(
        1, config.moe.expert_intermediate, config.hidden_size, aot.experts_format(config)
    )
    expert_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)
    plan = plan_dslp(
        prompt_shape(config, expert_bytes),
        num_ranks,
        (free_bytes or target.memory_bytes * 8 // 10) - aot.tree_bytes(state),
        tokens,
        kv_bytes=store.token_bytes(cache_spec(config, "bfloat16")[:1], 1),
        max_context=tokens + prefix,
    )
    rings = AbstractRings(config, plan, sharded)
    ops = DeviceOps(None, "prefill", one_sequence=True)
    how: Any = {"small_ep": SmallEp, "all_to_all": AllToAll}[exchange]
    dslp = DslpPrefill(
        graphdef,
        placed(state, whole),
        mesh,
        devices[0],
        ops,
        DeviceParts(ops),
        rings,  # pyright: ignore[reportArgumentType]
        plan,
        exchange=how("rank", num_ranks, config.moe.router.num_experts),
        groups=DeviceGroups(plan.rank.window_rows),
        page_size=aot.PAGE_SIZE,
    )
    rows = plan.rows(tokens)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    ids = jax.ShapeDtypeStruct((num_ranks * rows,), jnp.int32, sharding=sharded)
    positions = -(-(prefix + num_ranks) // aot.PAGE_SIZE)
    prompt = _Prompt(
        rows,
        ids,  # pyright: ignore[reportArgumentType]
        ids,  # pyright: ignore[reportArgumentType]
        Cut(scalar, scalar, scalar),  # pyright: ignore[reportArgumentType]
        [np.int32(b) for b in range(0, 2 * chunk_length(tokens, num_ranks), rows)],
        [jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=home)] * num_ranks,  # pyright: ignore
        jax.ShapeDtypeStruct((positions,), jnp.int32, sharding=home) if prefix else None,  # pyright: ignore
        (0, 0),
    )
    pages = (tokens + prefix) // aot.PAGE_SIZE
    caches = placed(aot.abstract_caches(config, pages), home)
    lowered = dslp.lower(prompt, tuple(rings.groups), caches)
    programs = {}
    for key, lower in lowered.items():
        if only is None or key[0] in only:
            begin = time.perf_counter()
            program = lower().compile()
            programs[_name(key)] = aot.Compiled.of(program, time.perf_counter() - begin)
    leaves = {kind: aot.tree_bytes(leaves) for kind, leaves in dslp._layers}
    expected = _expected(config, exchange, num_ranks, rows, dslp._prefix_rows(prompt) // num_ranks)
    slots = aot.tree_bytes(rings.groups) // num_ranks
    cache = aot.tree_bytes(caches[0])
    fixed = {_name(("embed",)): aot.tree_bytes(dslp._embed_leaves), "insert": cache, "fetch": cache}
    for kind, nbytes in leaves.items():
        fixed |= {_name((name, kind)): nbytes for name in ("keys", "chunk")}
        fixed[_name(("experts", kind))] = slots + nbytes
    expected = {
        name: dataclasses.replace(
            what, fixed=fixed.get(name, 0), inplace=what.inplace + cache * (name == "insert")
        )
        for name in programs
        for what in [expected[name.split()[0]]]
    }
    own = [
        jax.ShapeDtypeStruct((a.shape[0] // num_ranks, *a.shape[1:]), a.dtype)
        for a in jax.tree.leaves(rings.groups)
    ]
    return DslpPrograms(
        plan,
        exchange,
        most_experts(config.moe.router.num_experts, num_ranks),
        programs,
        expected,
        aot.hlo_shapes((state, own)),
        aot.hlo_shapes(caches[0]),
    )


def _name(key: tuple[Any, ...]) -> str:
    kinds = [
        "of a MoE layer" if k.is_moe else "of a dense layer"
        for k in key
        if isinstance(k, LayerKind)
    ]
    return " ".join([key[0], *kinds])


def _expected(
    config: ModelConfig, exchange: str, ranks: int, rows: int, prefix_rows: int
) -> dict[str, Expected]:
    """By the first word of a program's name; `fixed` is left out. rows, prefix_rows: of a rank."""
    hidden, per_token = config.hidden_size, config.moe.router.experts_per_token
    arrays = len(cache_spec(config, "bfloat16")[0])
    key = store.token_bytes(cache_spec(config, "bfloat16")[:1], 1)
    h, x, routed = rows * hidden * 4, rows * hidden * 2, rows * per_token * 8
    held = (rows + prefix_rows) * key
    others = ranks - 1
    turns = others * arrays * (2 if prefix_rows else 1)
    if exchange == "small_ep":
        there = {"all-gather": (3, others * (x + routed))}
        back = {"reduce-scatter": (1, others * h)}
        passed = ranks * x
        sent, kept = ranks * (x + routed), 0
    else:
        pairs = rows * min(per_token, most_experts(config.moe.router.num_experts, ranks))
        there = {"all-to-all": (3, others * pairs * (2 * hidden + 8))}
        back = {"all-to-all": (1, others * pairs * hidden * 4)}
        passed = ranks * pairs * hidden * 2
        sent, kept = passed + ranks * pairs * 8, rows * per_token * 4
    ring = {"collective-permute": (turns, others * held)}
    return {
        "embed": Expected({}, 0, 0, 0),
        "empty": Expected({}, 0, 0, h + x + routed + held),
        "fetch": Expected({}, 0, 0, h + x + routed + held),
        "keys": Expected({}, rows * key, 0, x + routed + held),
        "insert": Expected({}, 0, 0, h + x + routed + 2 * held),
        "chunk": Expected(ring, h + x + routed, 0, 0),
        "send": Expected(there, 0, 0, h + held),
        "experts": Expected({}, passed, 0, h + x + routed + held + kept),
        "back": Expected(back, h, 0, x + routed + held + sent),
    }
