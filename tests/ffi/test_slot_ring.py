"""The slot ring as compiled programs see it, on CPU devices."""

import contextlib
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import FORMATS, Layer, make_store, padded_columns

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import _native
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.ffi.registry import NATIVE_ERRORS, register_targets
from jaxmoe.ffi.slot_ring import (
    SlotJobs,
    SlotRing,
    SlotRingGroup,
    acquire,
    expert_buffers,
    release,
)

N = 8


def slot_arrays(num_slots, device=None, n=N):
    """Of each slot a float32 matrix and a vector."""
    device = device or jax.local_devices(backend="cpu")[0]
    return [
        [jax.device_put(np.full(s, np.nan, np.float32), device) for s in ((n, n), (n,))]
        for _ in range(num_slots)
    ]


def layer_weights(seed, num_layers, n=N):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.standard_normal((n, n)).astype(np.float32) / np.sqrt(n, dtype=np.float32),
            rng.standard_normal(n).astype(np.float32),
        )
        for _ in range(num_layers)
    ]


def jobs_of(layers, num_slots):
    jobs = SlotJobs()
    for i, parts in enumerate(layers):
        jobs.add_arrays(i % num_slots, f"layer {i}", [(b, 0, a) for b, a in enumerate(parts)])
    return jobs


def make_layer(ring, slot):
    """One compiled layer that reads its weights from a slot."""

    @jax.jit
    def layer(x, w, b):
        (x,) = acquire(ring, slot, x)
        x = jnp.tanh(jnp.einsum("tk,nk->tn", x, w, precision="highest") + b)
        return release(ring, slot, x)[0]

    return layer


def run(ring, layers, x):
    steps = [make_layer(ring, s) for s in range(len(ring.slots))]
    ring.start(jobs_of(layers, len(ring.slots)))
    for i in range(len(layers)):
        x = steps[i % len(steps)](x, *ring.slots[i % len(steps)])
    x = np.asarray(x)
    ring.finish()
    return x


def plain(layers, x):
    for w, b in layers:
        x = jnp.tanh(jnp.einsum("tk,nk->tn", x, w, precision="highest") + b)
    return np.asarray(x)


def tokens(t=3, n=N, seed=5):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((t, n)), jnp.float32)


def again_with_two_devices(name):
    """The same test in a process that has two CPU devices, and a thread for each to block in."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "NPROC": "4"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::{name}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("num_slots", [2, 3, 7])
@pytest.mark.parametrize("max_delay_s", [0.0, 2e-4])
def test_layers_compute_with_what_was_streamed(num_slots, max_delay_s):
    layers = layer_weights(num_slots, 40)
    with SlotRing(DeviceDriver.host(max_delay_s=max_delay_s), slot_arrays(num_slots)) as ring:
        for seed in range(2):
            x = tokens(seed=seed)
            np.testing.assert_allclose(run(ring, layers, x), plain(layers, x), rtol=2e-5, atol=1e-6)
        stats = ring.stats()
        assert stats["jobs"] == 40 and stats["bytes"] == 40 * 4 * (N * N + N)
        assert stats["copies"] == 80


def test_one_program_may_use_many_slots_and_scan():
    """Acquire and release keep their order in one program, unrolled and in a loop."""
    num_slots, rounds = 3, 5
    layers = layer_weights(0, num_slots * rounds)
    with SlotRing(DeviceDriver.host(max_delay_s=1e-4), slot_arrays(num_slots)) as ring:

        @jax.jit
        def program(x, slots):
            def body(x, _):
                for s, (w, b) in enumerate(slots):
                    (x,) = acquire(ring, s, x)
                    x = jnp.tanh(jnp.einsum("tk,nk->tn", x, w, precision="highest") + b)
                    (x,) = release(ring, s, x)
                return x, None

            return jax.lax.scan(body, x, length=rounds)[0]

        x = tokens()
        ring.start(jobs_of(layers, num_slots))
        got = np.asarray(program(x, ring.slots))
        ring.finish()
        np.testing.assert_allclose(got, plain(layers, x), rtol=2e-5, atol=1e-6)


def test_no_copy_of_a_slot_or_of_what_passes_through():
    with SlotRing(DeviceDriver.host(), slot_arrays(2)) as ring:
        text = make_layer(ring, 0).lower(tokens(), *ring.slots[0]).compile().as_text()
    calls = [line for line in text.splitlines() if "jaxmoe_slot_" in line]
    assert len(calls) == 2
    assert all("output_to_operand_aliasing={{}: (0, {})}" in line for line in calls), calls
    # The program's own operand is the caller's and is copied; nothing else is.
    copies = re.findall(r"^  %copy\S* = (\S+) copy\((\S+)\)", text, re.MULTILINE)
    assert [operand for _, operand in copies] in ([], ["%x.1"]), copies


@pytest.mark.parametrize("at_submission", [False, True])
def test_failed_copy_fails_its_run_and_the_next_one_works(at_submission):
    layers = layer_weights(1, 12)
    driver = DeviceDriver.host()
    with SlotRing(driver, slot_arrays(3)) as ring:
        driver.native.fail_copy(9, at_submission, "the bus caught fire")  # the first of layer 4
        with pytest.raises(NATIVE_ERRORS, match="layer 4 into slot 1.*the bus caught fire"):
            run(ring, layers, tokens())
        with pytest.raises(RuntimeError, match="layer 4 into slot 1.*the bus caught fire"):
            ring.finish()
        np.testing.assert_allclose(
            run(ring, layers, tokens()), plain(layers, tokens()), rtol=2e-5, atol=1e-6
        )


def test_abort_fails_what_still_acquires():
    layers = layer_weights(2, 6)
    with SlotRing(DeviceDriver.host(), slot_arrays(2)) as ring:
        steps = [make_layer(ring, s) for s in range(2)]
        ring.start(jobs_of(layers, 2))
        x = steps[0](tokens(), *ring.slots[0]).block_until_ready()
        ring.abort("the client left")
        with pytest.raises(NATIVE_ERRORS, match="aborted: the client left"):
            steps[1](x, *ring.slots[1]).block_until_ready()
        with pytest.raises(RuntimeError, match="aborted: the client left"):
            ring.finish()
        x = tokens()
        np.testing.assert_allclose(run(ring, layers, x), plain(layers, x), rtol=2e-5, atol=1e-6)


def test_two_devices_each_with_a_ring_under_one_name():
    devices = jax.local_devices(backend="cpu")[:2]
    if len(devices) < 2:
        again_with_two_devices("test_two_devices_each_with_a_ring_under_one_name")
        return
    mesh = jax.sharding.Mesh(np.array(devices), ("ep",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("ep"))
    num_slots, num_layers = 2, 10
    weights = [layer_weights(d, num_layers) for d in range(2)]
    with contextlib.ExitStack() as stack:
        rings = {
            device: stack.enter_context(
                SlotRing(DeviceDriver.host(max_delay_s=1e-4), slot_arrays(num_slots, device))
            )
            for device in devices
        }
        group = SlotRingGroup(rings)
        stack.callback(group.close)
        # One array over both devices, made of each one's own slot.
        slots = [
            [
                jax.make_array_from_single_device_arrays(
                    (2 * shard.shape[0], *shard.shape[1:]),
                    sharded,
                    [rings[device].slots[s][i] for device in devices],
                )
                for i, shard in enumerate(rings[devices[0]].slots[s])
            ]
            for s in range(num_slots)
        ]
        p = jax.sharding.PartitionSpec("ep")

        def local(x, slots):
            for i in range(num_layers):
                w, b = slots[i % num_slots]
                (x,) = acquire(group, i % num_slots, x)
                x = jnp.tanh(jnp.einsum("tk,nk->tn", x, w, precision="highest") + b)
                (x,) = release(group, i % num_slots, x)
            return x

        program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(p, p), out_specs=p))
        x = [tokens(seed=d) for d in range(2)]
        for d, device in enumerate(devices):
            rings[device].start(jobs_of(weights[d], num_slots))
        got = np.asarray(program(jax.device_put(np.concatenate(x), sharded), slots))
        for device in devices:
            rings[device].finish()
        want = np.concatenate([plain(weights[d], x[d]) for d in range(2)])
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
        with pytest.raises(ConfigError, match="is of"):
            SlotRingGroup({devices[0]: rings[devices[1]]})


@pytest.mark.parametrize("weight_format", FORMATS)
def test_experts_of_a_store(runtime, weight_format):
    rng = np.random.default_rng(3)
    num_experts, held = 5, 3
    f, d = padded_columns(weight_format, 130), padded_columns(weight_format, 24)
    layers = [Layer.random(rng, weight_format, num_experts, f, d) for _ in range(2)]
    with make_store(runtime, *layers) as store:
        shapes = expert_buffers(held, f, d, weight_format)
        slots = [[jnp.zeros(s, t) for s, t in shapes] for _ in range(2)]
        driver = DeviceDriver.host(copies_need_registered=True)
        with SlotRing(driver, slots) as ring:
            jobs = SlotJobs()
            jobs.add_experts(store, 0, 0, 0, held)
            with pytest.raises(ValueError, match="expert 5 of MoE layer 0"):
                jobs.add_experts(store, 0, 0, num_experts - 1, 2)
            assert jobs.unlocked_bytes == jobs.total_bytes > 0
            ring.start(jobs)
            with pytest.raises(RuntimeError, match="not within one page-locked range"):
                ring.finish()

            reports = []
            driver.lock_store(store, lambda done, total: reports.append((done, total)))
            assert reports[-1][0] == reports[-1][1] == store.locked_bytes
            jobs = SlotJobs()
            groups = [(0, 0, 0, 3), (1, 0, 3, 2), (0, 1, 1, 3), (1, 1, 4, 1)]
            for group in groups:
                jobs.add_experts(store, *group)
            assert len(jobs) == len(groups) and jobs.unlocked_bytes == 0
            ring.start(jobs)
            hold = [jax.jit(lambda x, s=s: acquire(ring, s, x)[0]) for s in range(2)]
            let_go = [jax.jit(lambda x, s=s: release(ring, s, x)[0]) for s in range(2)]
            for slot, layer, first, count in groups:
                x = hold[slot](jnp.zeros(1)).block_until_ready()
                for i, which in enumerate(("gate", "up", "down")):
                    weight = layers[layer].weights[which]
                    want = np.asarray(weight.data)[first : first + count]
                    got = np.asarray(slots[slot][i])[:count]
                    assert got.dtype == want.dtype
                    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
                    if weight.scale_inv is not None:
                        np.testing.assert_array_equal(
                            np.asarray(slots[slot][3 + i])[:count],
                            np.asarray(weight.scale_inv)[first : first + count],
                        )
                let_go[slot](x).block_until_ready()
            ring.finish()
    assert driver.native.registered_bytes > 0  # the jobs still hold the store
    del jobs
    assert driver.native.registered_bytes == 0


def test_locking_reports_its_failure_and_its_progress_function_s(runtime):
    layer = Layer.random(np.random.default_rng(0), "bf16", 2, 16, 16)
    with make_store(runtime, layer) as store:
        with pytest.raises(OSError, match="cannot page-lock the experts of NUMA node 0.*100"):
            DeviceDriver.host(max_registered_bytes=100).lock_store(store)

        def stop(done, total):
            raise KeyboardInterrupt

        driver = DeviceDriver.host()
        with pytest.raises(KeyboardInterrupt):
            driver.lock_store(store, stop)
        assert store.locked_bytes == 0 and driver.native.registered_bytes == 0
    array = np.zeros(100, np.float32)
    lock = driver.lock_arrays({"norms": array, "router": np.zeros((3, 4))})
    assert driver.native.registered_bytes == 400 + 96
    jobs = SlotJobs()
    jobs.add_arrays(0, "norms", [(0, 0, array)], lock)
    assert jobs.unlocked_bytes == 0
    lock.close()
    assert driver.native.registered_bytes == 496  # jobs copy from it
    del jobs
    assert driver.native.registered_bytes == 0


def test_rate_limit():
    layers = layer_weights(4, 10, 64)
    with SlotRing(DeviceDriver.host(bytes_per_s=20e6), slot_arrays(2, n=64)) as ring:
        started = time.monotonic()
        run(ring, layers, tokens(n=64))
        seconds = time.monotonic() - started
        least = ring.stats()["bytes"] / 20e6
        assert least == pytest.approx(10 * 4 * 65 * 64 / 20e6)
        assert ring.stats()["copy_s"] >= least * 0.999 and seconds >= least * 0.999


def test_rings_of_the_same_slots_take_turns():
    """What one left is written over; neither begins before the other's run has ended."""
    host = DeviceDriver.host()
    first, second = layer_weights(5, 9), layer_weights(6, 8)
    x = tokens()
    with SlotRing(host, slot_arrays(3)) as ring, SlotRing(host, ring.slots[:2], beside=ring) as few:
        for _ in range(2):
            for one, layers in ((ring, first), (few, second)):
                got = run(one, layers, x)
                np.testing.assert_allclose(got, plain(layers, x), rtol=2e-5, atol=1e-6)
        for one, other in ((ring, few), (few, ring)):
            one.start(jobs_of(first, 2))
            with pytest.raises(ValueError, match="another ring of the same slots"):
                other.start(jobs_of(first, 2))
            one.abort("enough")
            other.start(jobs_of(first, 2))
            other.abort("enough")


def test_bad_rings_and_jobs():
    driver = DeviceDriver.host()
    slots = slot_arrays(2)
    with pytest.raises(ConfigError, match="at least 2"):
        SlotRing(driver, slots[:1])
    with pytest.raises(ConfigError, match="share memory"):
        SlotRing(driver, [slots[0], slots[0]])
    with SlotRing(driver, slots) as ring:
        jobs = SlotJobs()
        jobs.add_arrays(0, "too much", [(0, 8, np.zeros((N, N), np.float32))])
        with pytest.raises(ValueError, match=r"job 0 \(too much\) writes up to byte 264"):
            ring.start(jobs)
        with pytest.raises(ValueError, match="not contiguous"):
            jobs.add_arrays(0, "rows", [(0, 0, np.zeros((N, N), np.float32).T[1:])])
        with pytest.raises(NATIVE_ERRORS, match="acquired without a run"):
            jax.jit(lambda x: acquire(ring, 0, x)[0])(tokens()).block_until_ready()
        with pytest.raises(NATIVE_ERRORS, match="slot 5 of a ring of 2"):
            jax.jit(lambda x: acquire(ring, 5, x)[0])(tokens()).block_until_ready()
        program = jax.jit(lambda x: acquire(ring, 0, x)[0]).lower(tokens()).compile()
    with pytest.raises(NATIVE_ERRORS, match="no slot ring has id"):
        program(tokens()).block_until_ready()
    with pytest.raises(ValueError, match="closed"):
        ring.start(SlotJobs())


def test_cuda_driver_or_the_reason_why_not():
    try:
        driver = DeviceDriver.cuda(0)
    except ConfigError as error:
        assert any(w in str(error) for w in ("libcuda.so.1", "cuInit", "no CUDA device"))
    else:
        assert "CUDA device 0" in driver.describe()


def test_cuda_handlers_lower_for_a_gpu():
    """The program's text for a GPU names the same targets; its handlers exist."""
    register_targets()
    assert {"jaxmoe_slot_acquire", "jaxmoe_slot_release"} <= set(_native.cuda_handlers())
    with SlotRing(DeviceDriver.host(), slot_arrays(2)) as ring:
        traced = make_layer(ring, 1).trace(tokens(), *ring.slots[1])
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("jaxmoe_slot_acquire") == 1 and text.count("jaxmoe_slot_release") == 1


def test_a_pace_holds_every_byte_back():
    with SlotRing(DeviceDriver.host(), slot_arrays(2)) as ring:
        layers = layer_weights(0, 6)
        total = jobs_of(layers, 2).total_bytes
        want = plain(layers, tokens())
        np.testing.assert_allclose(run(ring, layers, tokens()), want, rtol=1e-5)
        assert ring.stats()["paced_bytes"] == 0
        ring.set_pace(1e6)
        np.testing.assert_allclose(run(ring, layers, tokens()), want, rtol=1e-5)
        stats = ring.stats()
        assert stats["paced_bytes"] == stats["bytes"] == total
        assert stats["paced_s"] == pytest.approx(total / 1e6, rel=1e-4)
        with pytest.raises(ValueError, match="0 or more"):
            ring.set_pace(-1)
