"""Both ways of expert parallelism, experts streamed by each device, against all of them in one
place. Collected by tests/prefill/test_dslp.py only, in a process with two devices.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.native import Layer, make_store

from jaxmoe.common.collectives import count_collectives, exchanged_bytes
from jaxmoe.ffi import experts as experts_op
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.moe.experts_streamed import NativeGroups, StreamedExperts
from jaxmoe.moe.small_ep import AllToAll, SmallEp, expert_share, most_experts
from jaxmoe.prefill.plan import SlpPlan
from jaxmoe.prefill.rank_rings import RankRings, rank_mesh
from jaxmoe.weights.host_store import ExpertLayout

RANKS, TOKENS, PER_TOKEN = 2, 12, 3  # TOKENS of each rank
F, D = 40, 24
SPEC = PartitionSpec("rank")


@pytest.fixture(scope="module")
def runtime():
    with CpuRuntime(num_threads=1) as runtime:
        yield runtime


def mapped(mesh, f, *donate):
    shard = jax.shard_map(f, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False)
    return jax.jit(shard, donate_argnums=donate)


def routing(rng, num_experts, mesh):
    """x, ids and weights of all ranks: some padding, one rank's tokens all of two experts."""
    ids = np.stack(
        [rng.permutation(num_experts)[:PER_TOKEN] for _ in range(RANKS * TOKENS)]
    ).astype(np.int32)
    ids[3] = ids[TOKENS + 1] = -1
    ids[TOKENS + 2 :, 0] = 0
    ids[TOKENS + 2 :, 1:] = num_experts - 1
    weights = rng.random(ids.shape, np.float32)
    x = rng.standard_normal((RANKS * TOKENS, D)).astype(np.float32)
    return [jax.device_put(a, NamedSharding(mesh, SPEC)) for a in (x, ids, weights)]


@pytest.mark.parametrize(
    ("way", "num_experts", "ring"),
    [
        (SmallEp, 5, (1, 3)),
        (AllToAll, 5, (1, 3)),
        (SmallEp, 7, (2, 2)),
        (SmallEp, 8, (1, 2)),
        (AllToAll, 8, (2, 2)),
    ],
)
def test_sums_are_those_of_all_experts_in_one_place(runtime, way, num_experts, ring):
    """Odd numbers of experts too: one device has one more, and nothing else streams."""
    group, slots = ring
    rng = np.random.default_rng(num_experts)
    layers = [Layer.random(rng, "f32", num_experts, F, D) for _ in range(3)]
    mesh = rank_mesh(jax.local_devices(backend="cpu")[:RANKS])
    exchange = way("rank", RANKS, num_experts)
    most = most_experts(num_experts, RANKS)
    with make_store(runtime, *layers) as native:
        layout = ExpertLayout(num_experts, F, D, "f32")
        store = types.SimpleNamespace(native=native, layouts=[layout] * len(layers))
        plan = SlpPlan(group, slots, 64, 64, 64, 0, 0)
        drivers = {d: DeviceDriver.host(max_delay_s=1e-4) for d in mesh.devices.flat}
        rings = RankRings(mesh, drivers, store, plan)
        send, back = mapped(mesh, exchange.send), mapped(mesh, exchange.back)

        def compute(x, ids, weights, slots):
            streamed = StreamedExperts(slots, most, NativeGroups(runtime), rings)
            return streamed.add_to(jnp.zeros(x.shape, jnp.float32), x, ids, weights)

        experts = mapped(mesh, compute)
        rings.start()
        for index in range(len(layers)):
            x, ids, weights = routing(rng, num_experts, mesh)
            sent = send(x, ids, weights)
            y, _ = experts(sent.x, sent.expert_ids, sent.combine_weights, tuple(rings.groups))
            got = back(jax.block_until_ready(y), sent.kept)
            want = experts_op.experts(
                runtime,
                native,
                "matrix",
                *(jnp.asarray(np.asarray(a)) for a in (x, ids, weights)),
                index,
            )
            np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))
        rings.finish()
        # Half of all, give or take one expert.
        one = layout.total_bytes // num_experts * len(layers)
        by_rank = [expert_share(num_experts, RANKS, r)[1] * one for r in range(RANKS)]
        assert [s["bytes"] for s in rings.stats()] == rings.streamed_bytes == by_rank
        assert sum(by_rank) == num_experts * one and abs(by_rank[0] - by_rank[1]) <= one
        rings.close()


def test_what_is_sent_is_what_the_programs_say():
    """Counted from the compiled programs, held to what the exchanges must move at least."""
    num_experts = 8
    mesh = rank_mesh(jax.local_devices(backend="cpu")[:RANKS])
    x, ids, weights = routing(np.random.default_rng(0), num_experts, mesh)
    x = x.astype(jnp.bfloat16)
    sums = D * 4
    there, capacity = D * 2 + PER_TOKEN * 8, TOKENS * PER_TOKEN // RANKS
    pair = D * 2 + 8
    for exchange, kinds, bytes_there, bytes_back in (
        (
            SmallEp("rank", RANKS, num_experts),
            ({"all-gather": 3}, {"reduce-scatter": 1}),
            TOKENS * there,
            TOKENS * sums,
        ),
        (
            AllToAll("rank", RANKS, num_experts, capacity),
            ({"all-to-all": 3}, {"all-to-all": 1}),
            capacity * pair,
            capacity * sums,
        ),
    ):
        send, back = mapped(mesh, exchange.send), mapped(mesh, exchange.back)
        sent = jax.eval_shape(send, x, ids, weights)
        y = jax.ShapeDtypeStruct(sent.x.shape, jnp.float32)
        texts = [
            send.lower(x, ids, weights).compile().as_text(),
            back.lower(y, sent.kept).compile().as_text(),
        ]
        assert [dict(count_collectives(text)) for text in texts] == list(kinds)
        found = [sum(exchanged_bytes(text, RANKS).values()) for text in texts]
        assert found == [(RANKS - 1) * bytes_there, (RANKS - 1) * bytes_back]
