"""Stream-loading prefill of tiny checkpoints on the CPU platform, against prefill in chunks."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from support import tiny_models
from support.tiny_runner import native_runner

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.registry import NATIVE_ERRORS
from jaxmoe.models import registry
from jaxmoe.prefill import device as device_module
from jaxmoe.prefill.device import SlpDevice
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.safetensors_reader import Checkpoint

CHUNK = 32


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.write_checkpoint(folder, request.param)
    config = ModelConfig.from_hf(tiny_models.hf_config(request.param))
    runtime = CpuRuntime(num_threads=1)
    loaded = load_model(Checkpoint.open(folder), config, registry, runtime, compute_dtype="float32")
    yield request.param, folder, config, runtime, loaded
    loaded.close()
    runtime.close()


def _slp(case, **options) -> SlpDevice:
    _, _, config, runtime, loaded = case
    device = jax.local_devices(backend="cpu")[0]
    return SlpDevice(
        loaded,
        config,
        device,
        options.pop("driver", None) or DeviceDriver.host(),
        runtime,
        **{
            "max_prompt_tokens": 80,
            "free_bytes": 1 << 30,
            "chunk_tokens": CHUNK,
            "compute_dtype": "float32",
            **options,
        },
    )


def _logits(case, last: jax.Array) -> np.ndarray:
    *_, runtime, loaded = case
    model = nnx.merge(loaded.graphdef, loaded.state)
    return np.asarray(model.head(last, NativeOps(runtime, None, "matrix")))[0]


def test_last_token_is_that_of_prefill_in_chunks(case):
    name, folder, config, *_ = case
    slp = _slp(case)
    rng = np.random.default_rng(5)
    for count in (1, CHUNK, CHUNK + 1, 78):
        prompt = rng.integers(1, 90, count).tolist()
        runner = native_runner(name, "float32", folder, "matrix")
        runner.reset()
        want = None
        pages = rng.permutation(5)[: -(-count // slp.page_size)].tolist()
        for begin in range(0, count, 40):
            want = runner.step([prompt[begin : begin + 40], [], []], 40)[0][-1]
        row = StepRow(prompt, 0, pages, 0, settings=None)
        got = _logits(case, slp.prefill(row))
        np.testing.assert_allclose(got, want, atol=2e-4 * float(np.abs(want).max()))
    stats = slp.stats()
    assert stats["bytes"] == slp.streamed_bytes
    slp.close()


def test_streamed_weights_give_the_bits_of_resident_ones(case):
    """Through slots that layers of one shape share, and in copies that every layer waits for."""
    *_, loaded = case
    rng = np.random.default_rng(6)
    rows = [
        StepRow(rng.integers(1, 90, count).tolist(), 0, [3, 0, 4, 1, 2], 0, settings=None)
        for count in (1, CHUNK + 1, 78)
    ]
    resident = _slp(case)
    want = [np.asarray(resident.prefill(row)) for row in rows]
    experts = resident.streamed_bytes
    assert resident.plan.weight_slots == 0
    assert resident.plan.weight_bytes == sum(leaf.nbytes for leaf in loaded.leaves)
    resident.close()
    driver = DeviceDriver.host(max_delay_s=2e-4, copies_need_registered=True)
    driver.lock_store(loaded.host_store.native)
    model = nnx.merge(loaded.graphdef, loaded.state)
    layers = [jax.tree.leaves(nnx.split(layer)[1]) for layer in model.layers]
    layer_bytes = sum(leaf.nbytes for leaves in layers for leaf in leaves)
    smallest = None
    for slots in (2, 1):
        slp = _slp(case, driver=driver, weights="streamed", free_bytes=smallest or 1 << 30)
        assert slp.plan.weight_slots == slots
        assert slp.streamed_bytes == experts + layer_bytes
        for row, last in zip(rows, want, strict=True):
            np.testing.assert_array_equal(np.asarray(slp.prefill(row)), last)
            assert slp.stats()["bytes"] == slp.streamed_bytes
        assert slp.copy_alone() > 0
        # With two expert slots and a byte less than these weight slots take, one is left.
        plan = slp.plan
        two_slots = plan.ring_bytes // (plan.num_slots * plan.group_experts) * 2
        smallest = two_slots + plan.activation_bytes + plan.weight_bytes - 1
        slp.close()
    assert not driver.native.violations()


def _poisoned(ring):
    """The ring, whose slots hold nothing that could be used once they are released."""
    release = ring.release

    def poison(slot, *arrays):
        for array in ring._ring.slots[slot]:
            address = array.unsafe_buffer_pointer()
            ctypes.memset(address, 0xFF, array.nbytes)  # NaN in every format
        return arrays

    def release_poisoned(slot, *arrays):
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        arrays = jax.pure_callback(partial(poison, slot), shapes, *arrays)
        return release(slot, *arrays)

    ring.release = release_poisoned


@pytest.mark.parametrize("rounds", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_random_delays_and_poisoned_slots_change_nothing(case, rounds, monkeypatch):
    """Loader, model thread and unloader late at random, rings of every length; thousands of layers
    in the long form.
    """
    config = case[2]
    prompt = np.random.default_rng(7).integers(1, 90, 70).tolist()
    row = StepRow(prompt, 0, [3, 0, 4, 1, 2], 0, settings=None)
    quiet = _slp(case)
    want = np.asarray(quiet.prefill(row))
    quiet.close()
    expert = quiet.plan.ring_bytes // (quiet.plan.num_slots * quiet.plan.group_experts)
    make_ring = device_module.ExpertRing

    def poisoned_ring(*args, **options):
        ring = make_ring(*args, **options)
        _poisoned(ring)
        return ring

    monkeypatch.setattr(device_module, "ExpertRing", poisoned_ring)
    random = np.random.default_rng(8)
    lengths = set()
    for weights, experts in (("resident", 2), ("streamed", 3), ("streamed", 1000)):
        other = quiet.plan.weight_bytes if weights == "resident" else 2 * quiet.plan.weight_bytes
        driver = DeviceDriver.host(max_delay_s=1e-4, seed=int(random.integers(1 << 30)))
        slp = _slp(
            case,
            driver=driver,
            weights=weights,
            free_bytes=quiet.plan.activation_bytes + other + experts * expert,
        )
        lengths.add(slp.plan.num_slots * slp.plan.group_experts)
        for _ in range(rounds):
            run = slp.layers(row)
            for _ in range(config.num_layers):
                next(run)
                time.sleep(float(random.random()) * 1e-4)
            with pytest.raises(StopIteration) as end:
                next(run)
            np.testing.assert_array_equal(np.asarray(end.value.value), want)
        slp.close()
    assert len(lengths) > 1, lengths


def test_a_run_that_ends_early_leaves_a_ring_that_works(case):
    """Cancelled in any layer, or a copy that fails: the next run is right."""
    row = StepRow(list(range(1, 60)), 0, [3, 0, 4, 1, 2], 0, settings=None)
    driver = DeviceDriver.host(max_delay_s=1e-4)
    slp = _slp(case, driver=driver, weights="streamed")
    want = np.asarray(slp.prefill(row))
    for layer in range(case[2].num_layers):
        run = slp.layers(row)
        for _ in range(layer + 1):
            next(run)
        run.close()
    driver.native.fail_copy(5, False, "the cable was pulled")
    with pytest.raises(NATIVE_ERRORS, match="the cable was pulled"):
        slp.prefill(row)
    np.testing.assert_array_equal(np.asarray(slp.prefill(row)), want)
    slp.close()


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_memory_stays_within_the_plan(case, weights):
    """All arrays that a run holds between and within layers, and every program's temporaries."""
    device = jax.local_devices(backend="cpu")[0]
    others = jax.live_arrays()  # kept, so that their ids stay theirs
    before = {id(a) for a in others}
    config = case[2]
    slp = _slp(case, weights=weights, max_prompt_tokens=4 * CHUNK)
    caches = {id(a) for a in jax.tree.leaves(slp._caches)}

    def held() -> int:
        arrays = [a for a in jax.live_arrays() if id(a) not in before | caches]
        addresses = {a.unsafe_buffer_pointer(): a.nbytes for a in arrays if device in a.devices()}
        return sum(addresses.values())

    at_rest = held()
    row = StepRow(list(range(1, 80)) * 2, 0, list(range(10)), 0, settings=None)
    row = dataclasses.replace(row, token_ids=row.token_ids[: 4 * CHUNK - 1], pages=row.pages[:8])
    most = 0
    run = slp.layers(row)
    for _ in range(config.num_layers):
        next(run)
        most = max(most, held())
    run.close()
    temporaries = 0
    for program in slp._slp._compiled.values():
        memory = program.memory_analysis()
        new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = max(temporaries, new)
    # On the CPU resident weights are the loader's own arrays, which no copy was made of.
    own = slp.plan.weight_bytes if weights == "streamed" else 0
    assert slp.plan.ring_bytes + own <= at_rest < most
    assert most + temporaries <= slp.plan.device_bytes - slp.plan.weight_bytes + own
    slp.close()
