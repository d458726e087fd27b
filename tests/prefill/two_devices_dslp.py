"""DSLP of tiny checkpoints on two CPU devices, against transformers' logits and plain prefill.

Collected by test_dslp.py only, in a process with two devices.
"""

from __future__ import annotations

import dataclasses
import gc
import time

import jax
import numpy as np
import pytest
from flax import nnx
from support import tiny_models
from support.compare import mean_kl, relative_error
from support.parity import load_fixture
from support.plain_prefill import PlainPrefill, cached
from support.tiny_runner import PAGE_SIZE

from jaxmoe.common.collectives import count_collectives, exchanged_bytes
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.registry import NATIVE_ERRORS
from jaxmoe.models import registry
from jaxmoe.prefill.dslp_devices import DslpDevices
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.safetensors_reader import Checkpoint

CASES = ("deepseek_v3_fp8", "qwen3_moe_fp8", "deepseek_v3", "qwen3_moe")
CHUNK = 64
RINGS = ((1, 2), (1, 3), (2, 2), (2, 3), (1, 6), (4, 3), (3, 4), (6, 2), (1, 12))
ROOM = 304  # tokens; of what tests share, so that programs are compiled once
# As tests/parity and tests/prefill/test_slp.py.
FLOAT32_TOLERANCE, SAME_TOLERANCE = 1e-4, 2e-4


@dataclasses.dataclass
class Model:
    """A tiny checkpoint, loaded in one compute dtype."""

    case: str
    folder: object
    config: ModelConfig
    runtime: CpuRuntime
    loaded: object
    dtype: str
    shared: dict = dataclasses.field(default_factory=dict)

    def shared_devices(self, **options) -> DslpDevices:
        """Of `ROOM` tokens, the same for every test that asks for it; not to be closed."""
        key = "devices", tuple(options.items())
        if key not in self.shared:
            if options.pop("delayed", False):
                both = jax.local_devices(backend="cpu")[:2]
                options["drivers"] = {d: DeviceDriver.host(max_delay_s=1e-4) for d in both}
            self.shared[key] = self.devices(ROOM, **options), options.get("drivers")
        return self.shared[key][0]

    def drivers_of(self, **options):
        """Those of `shared_devices`."""
        self.shared_devices(**options)
        return self.shared["devices", tuple(options.items())][1]

    def plain(self, max_tokens=ROOM) -> PlainPrefill:
        if max_tokens not in self.shared:
            self.shared[max_tokens] = PlainPrefill(
                self.loaded, self.config, self.runtime, max_tokens, dtype=self.dtype
            )
        return self.shared[max_tokens]

    def close(self) -> None:
        for key, made in self.shared.items():
            if isinstance(key, tuple):
                made[0].close()
        self.shared.clear()
        self.loaded.close()
        self.runtime.close()

    def devices(self, max_tokens=1100, drivers=None, **options) -> DslpDevices:
        both = jax.local_devices(backend="cpu")[:2]
        return DslpDevices(
            self.loaded,
            self.config,
            both,
            drivers or {device: DeviceDriver.host() for device in both},
            self.runtime,
            max_prompt_tokens=max_tokens,
            free_bytes=1 << 30,
            page_size=PAGE_SIZE,
            chunk_tokens=options.pop("chunk_tokens", CHUNK),
            compute_dtype=self.dtype,
            **options,
        )

    def logits(self, last) -> np.ndarray:
        if "head" not in self.shared:  # compiled once: thousands of prompts ask for it
            ops = NativeOps(self.runtime, None, "matrix")
            self.shared["head"] = jax.jit(
                lambda state, last: nnx.merge(self.loaded.graphdef, state).head(last, ops)
            )
        return np.asarray(self.shared["head"](self.loaded.state, last))[0]


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """(case, compute dtype) -> Model; all closed at the end."""
    made = {}

    def make(case: str, dtype: str = "float32") -> Model:
        if (case, dtype) not in made:
            folder = tmp_path_factory.mktemp(case)
            tiny_models.write_checkpoint(folder, case)
            config = ModelConfig.from_hf(tiny_models.hf_config(case))
            runtime = CpuRuntime(num_threads=1)
            loaded = load_model(
                Checkpoint.open(folder), config, registry, runtime, compute_dtype=dtype
            )
            made[case, dtype] = Model(case, folder, config, runtime, loaded, dtype)
        return made[case, dtype]

    yield make
    for one in made.values():
        one.close()


@pytest.mark.parametrize(
    ("case", "dtype", "every"),
    [
        ("deepseek_v3_fp8", "float32", 5),
        *(
            pytest.param(case, dtype, 1, marks=pytest.mark.slow)
            for case in CASES
            for dtype in ("float32", "bfloat16")
        ),
    ],
)
def test_logits_at_every_length_are_those_of_transformers(model, case, dtype, every):
    """Every beginning of the fixture's prompts is a prompt of its own, cut its own way."""
    fixture, it = load_fixture(case), model(case, dtype)
    dslp = it.shared_devices()
    rng = np.random.default_rng(1)
    beginnings = [prompt[: i + 1] for prompt in fixture.prompts for i in range(len(prompt))]
    rows = []
    for tokens in beginnings[::every]:
        pages = rng.permutation(4).tolist()
        rows.append(it.logits(dslp.prefill(StepRow(tokens, 0, pages, 0, None))))
    logits = np.stack(rows)
    if dtype == "float32":
        assert relative_error(logits, fixture.logits[::every]) <= FLOAT32_TOLERANCE
    else:
        assert every == 1
        theirs = mean_kl(fixture.logits_bf16, fixture.logits)
        assert mean_kl(logits, fixture.logits) <= theirs
        assert relative_error(logits, fixture.logits) > 1e-4


def prompt_of(count: int, seed: int = 5) -> list[int]:
    return np.random.default_rng(seed).integers(1, 500, count).tolist()


def pages_for(dslp: DslpDevices, count: int) -> list[int]:
    """In no order, so that a position read from the wrong page shows."""
    pages = np.random.default_rng(2).permutation(dslp.caches[0][0].shape[0])
    return pages[: -(-count // dslp.page_size)].tolist()


def assert_same(model: Model, plain: PlainPrefill, dslp: DslpDevices, row: StepRow) -> None:
    """The logits and all keys and values of all layers, float32, are those of plain prefill."""
    want, got = plain.run(row), model.logits(dslp.prefill(row))
    np.testing.assert_allclose(got, want, atol=SAME_TOLERANCE * float(np.abs(want).max()))
    for layer in range(model.config.num_layers):
        for w, g in zip(
            cached(plain.caches, row, layer), cached(dslp.caches, row, layer), strict=True
        ):
            np.testing.assert_allclose(g, w, atol=SAME_TOLERANCE * float(np.abs(w).max()))


@pytest.mark.parametrize(
    ("case", "lengths"),
    [
        ("deepseek_v3_fp8", (1, 127, 129)),
        *(
            pytest.param(case, (1, 127, 128, 129, 1000), marks=pytest.mark.slow)
            for case in (*CASES, "gpt_oss")
        ),
        *(pytest.param(case, (4097,), marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_prompts_of_all_lengths_are_those_of_plain_prefill(model, case, lengths):
    it, room = model(case), max(lengths) + 16
    plain, dslp = it.plain(max(room, ROOM)), it.devices(room) if room > ROOM else None
    dslp = dslp or it.shared_devices()
    for count in lengths:
        assert_same(it, plain, dslp, StepRow(prompt_of(count), 0, pages_for(dslp, count), 0, None))
    assert [s["bytes"] for s in dslp.rings.stats()] == dslp.rings.streamed_bytes
    if room > ROOM:
        dslp.close()


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        ("qwen3_moe_fp8", ((48, 129), (255, 45))),
        *(
            pytest.param(c, ((16, 1), (48, 129), (250, 33), (255, 45)), marks=pytest.mark.slow)
            for c in (*CASES, "gpt_oss")
        ),
    ],
)
def test_a_prompt_goes_on_from_what_is_cached(model, case, cuts):
    """By plain prefill or by a pass before, whole pages or not, longer or shorter than the rest."""
    it = model(case)
    plain, dslp = it.plain(), it.shared_devices()
    pages = pages_for(dslp, 300)
    for first, second in cuts:
        tokens = prompt_of(first + second, seed=first)
        before = StepRow(tokens[:first], 0, pages, 0, None)
        plain.run(before)
        dslp.caches = [tuple(a.copy() for a in arrays) for arrays in plain.caches]
        assert_same(it, plain, dslp, StepRow(tokens[first:], first, pages, 0, None))
        dslp.prefill(before)
        assert_same(it, plain, dslp, StepRow(tokens[first:], first, pages, 0, None))


@pytest.mark.parametrize(
    ("case", "rings"),
    [
        (CASES[0], ((6, 2),)),
        *(
            pytest.param(case, RINGS, marks=pytest.mark.slow)
            for case in ("deepseek_v3_fp8", "qwen3_moe")
        ),
    ],
)
def test_rings_of_any_length(model, case, rings):
    """(experts of a slot, slots), from two experts of the rank's twelve to all of them."""
    it = model(case)
    plain = it.plain()
    for ring in rings:
        dslp = it.devices(200, ring=ring)
        row = StepRow(prompt_of(129), 0, pages_for(dslp, 129), 0, None)
        assert_same(it, plain, dslp, row)
        dslp.close()


def test_each_device_streams_its_half(model):
    it = model("qwen3_moe_fp8")
    dslp = it.shared_devices()
    layout = it.loaded.host_store.layouts[0]
    total = layout.total_bytes * len(it.loaded.host_store.layouts)
    assert dslp.rings.streamed_bytes == [total // 2, total // 2]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_programs_have_the_collectives_they_need_and_no_others(model, dtype):
    """None where a load may fail. Keys (and values) go round once, a piece of the prefix with them;
    what is sent is counted from the programs, in their own formats.
    """
    it = model("deepseek_v3_fp8", dtype)
    dslp = it.shared_devices()
    pages = pages_for(dslp, 80)
    dslp.prefill(StepRow(prompt_of(40), 0, pages, 0, None))
    dslp.prefill(StepRow(prompt_of(40), 40, pages, 0, None))
    found, rows = {}, dslp.plan.rank.buffer_tokens(20)
    for key, program in dslp.dslp.programs.items():
        if key[0] != "fetch" and rows not in key[1:3]:
            continue  # of longer prompts of other tests
        name = "chunk after a prefix" if key[0] == "chunk" and key[-1] else key[0]
        found.setdefault(name, set()).add(
            (
                *count_collectives(program.as_text()).items(),
                *exchanged_bytes(program.as_text(), 2).items(),
            )
        )
    config, size = it.config, 4 if dtype == "float32" else 2
    position = (config.attention.kv_lora_rank + config.attention.rope_head_dim) * size
    token = config.hidden_size * size + config.moe.router.experts_per_token * 8
    (prefix,) = {key[-1] for key in dslp.dslp.programs if key[0] == "fetch"}
    ring = "collective-permute"
    assert found == {
        **dict.fromkeys(("embed", "empty", "insert", "fetch", "keys", "experts"), {()}),
        "chunk": {((ring, 1), (ring, rows * position))},
        "chunk after a prefix": {((ring, 2), (ring, (rows + prefix // 2) * position))},
        "send": {(("all-gather", 3), ("all-gather", rows * token))},
        "back": {(("reduce-scatter", 1), ("reduce-scatter", rows * config.hidden_size * 4))},
    }


def test_all_to_all_computes_the_same(model):
    it = model("qwen3_moe_fp8")
    plain, dslp = it.plain(), it.devices(200, exchange="all_to_all")
    for count in (1, 127):
        assert_same(it, plain, dslp, StepRow(prompt_of(count), 0, pages_for(dslp, count), 0, None))
    dslp.close()


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize(("rank", "at_submission"), [(0, True), (1, False)])
def test_a_failed_copy_on_one_device_fails_that_prompt_alone(model, rank, at_submission):
    """No device is left waiting for the one that failed, and nothing it had stays."""
    it = model("qwen3_moe_fp8")
    both = jax.local_devices(backend="cpu")[:2]
    plain, dslp = it.plain(), it.shared_devices(ring=(3, 2), delayed=True)
    drivers = it.drivers_of(ring=(3, 2), delayed=True)
    row = StepRow(prompt_of(127), 0, pages_for(dslp, 127), 0, None)
    assert_same(it, plain, dslp, row)
    before = live_bytes()
    for copy in (3, 40):  # in the first layer with experts, and in the next
        drivers[both[rank]].native.fail_copy(copy, at_submission, "the bus caught fire")
        with pytest.raises(NATIVE_ERRORS, match="experts .* into slot .*the bus caught fire"):
            dslp.prefill(row)
        assert live_bytes() == before
        assert_same(it, plain, dslp, row)


def test_a_prompt_may_be_dropped_after_any_layer(model):
    it = model("qwen3_moe_fp8")
    plain, dslp = it.plain(), it.shared_devices(ring=(3, 2), delayed=True)
    row = StepRow(prompt_of(127), 0, pages_for(dslp, 127), 0, None)
    assert_same(it, plain, dslp, row)
    before = live_bytes()
    for layers in range(it.config.num_layers + 1):
        run = dslp.layers(row)
        for _ in range(layers):
            next(run)
        run.close()
        assert live_bytes() == before
    assert_same(it, plain, dslp, row)


def test_memory_stays_within_the_plan(model):
    """Of each device: what a run holds after every layer, and every program's temporaries."""
    it = model("qwen3_moe_fp8")
    dslp, both = it.shared_devices(), jax.local_devices(backend="cpu")[:2]
    row = StepRow(prompt_of(127), 0, pages_for(dslp, 127), 0, None)
    dslp.prefill(row)
    rest = [held(device) for device in both]
    most = 0
    run = dslp.layers(row)
    for _ in range(it.config.num_layers):
        next(run)
        most = max(most, *(held(d) - r for d, r in zip(both, rest, strict=True)))
    run.close()
    temporaries = 0
    for program in dslp.dslp.programs.values():
        memory = program.memory_analysis()
        new = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = max(temporaries, new)
    assert 0 < most and most + temporaries <= dslp.plan.work_bytes


def held(device) -> int:
    """Bytes of all arrays and parts of arrays on the device."""
    gc.collect()
    parts = [s.data for a in jax.live_arrays() for s in a.addressable_shards if s.device == device]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in parts}.values())


def test_closing_gives_the_devices_memory_back(model):
    it = model("qwen3_moe_fp8")
    before = live_bytes()
    dslp = it.devices(64)
    assert live_bytes() > before
    dslp.close()
    del dslp
    assert live_bytes() == before


@pytest.mark.parametrize(
    ("prompts", "rings"),
    [
        (15, ((1, 2),)),
        pytest.param(1000, ((1, 2), (4, 3), (3, 2)), marks=pytest.mark.slow),
    ],
)
def test_no_delay_anywhere_changes_a_value(model, prompts, rings):
    """Loaders and compute threads are delayed at random, each device by itself; some prompts fail,
    some are dropped. Every layer's experts differ, so weights of another one show.
    """
    it, random = model("qwen3_moe_fp8"), np.random.default_rng(11)
    both = jax.local_devices(backend="cpu")[:2]
    lengths = (1, 20, 60)
    plain, want, layers = it.plain(), {}, 0
    for length in lengths:
        row = StepRow(prompt_of(length), 0, list(range(4)), 0, None)
        want[length] = plain.run(row)
    for ring in rings:
        drivers = {
            device: DeviceDriver.host(max_delay_s=delay, seed=int(random.integers(1000)))
            for device, delay in zip(both, random.choice([1e-4, 1e-3], 2), strict=True)
        }
        dslp = it.devices(64, drivers, ring=ring, chunk_tokens=32)
        for _ in range(prompts):
            length = int(random.choice(lengths))
            row = StepRow(prompt_of(length), 0, random.permutation(4).tolist(), 0, None)
            fate = random.random()
            if fate < 0.1:
                driver = drivers[both[int(random.integers(2))]]
                driver.native.fail_copy(int(random.integers(1, 20)), fate < 0.05, "on fire")
                with pytest.raises(NATIVE_ERRORS, match="on fire"):
                    dslp.prefill(row)
                continue
            run = dslp.layers(row)
            for _ in range(it.config.num_layers):
                next(run)
                layers += 1
                if random.random() < 0.3:
                    time.sleep(random.random() * 2e-3)
                if fate < 0.2 and random.random() < 0.3:
                    break
            else:
                with pytest.raises(StopIteration) as end:
                    next(run)
                got = it.logits(end.value.value)
                tolerance = SAME_TOLERANCE * float(np.abs(want[length]).max())
                np.testing.assert_allclose(got, want[length], atol=tolerance)
            run.close()
        dslp.close()
    assert layers > len(rings) * prompts * it.config.num_layers / 2
