"""Prompts of all lengths on one device, in chunks and streamed through rings of any length.

Held to one whole step of decode's kernels, which tests/parity holds to transformers.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from support import tiny_models
from support.plain_prefill import PlainPrefill, cached

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.models import registry
from jaxmoe.prefill.device import SlpDevice, prompt_shape
from jaxmoe.prefill.plan import LADDER, activation_bytes
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.safetensors_reader import Checkpoint

CHUNK, WINDOW = 64, 16384
TOLERANCE = 2e-4  # of the largest value; float32, so only the order of additions differs
RINGS = (2, 3, 4, 6, 8, 12, 24)  # experts that they hold
LENGTHS = (1, 127, 128, 129, 1000)
SLOW = ("deepseek_v3_fp8", "deepseek_v3", "qwen3_moe")
CASES = ["qwen3_moe_fp8", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@dataclasses.dataclass
class Model:
    config: ModelConfig
    runtime: CpuRuntime
    loaded: object

    def plain(self, max_tokens: int, chunk: int, family: str) -> PlainPrefill:
        ops = NativeOps(self.runtime, self.loaded.host_store, family)
        return PlainPrefill(
            self.loaded,
            self.config,
            self.runtime,
            max_tokens,
            dtype="float32",
            chunk=chunk,
            ops=ops,
        )

    def slp(self, max_tokens: int, ring_experts: int = 24) -> SlpDevice:
        layout = self.loaded.host_store.layouts[0]
        expert = layout.total_bytes // layout.num_experts
        shape = prompt_shape(self.config, expert, 4)
        tokens = next(n * CHUNK for n in LADDER if n * CHUNK >= max_tokens)
        used = activation_bytes(shape, tokens, CHUNK, WINDOW)
        used += sum(leaf.nbytes for leaf in self.loaded.leaves)  # weights beside the experts
        return SlpDevice(
            self.loaded,
            self.config,
            jax.local_devices(backend="cpu")[0],
            DeviceDriver.host(),
            self.runtime,
            max_prompt_tokens=max_tokens,
            free_bytes=used + ring_experts * expert,
            chunk_tokens=CHUNK,
            compute_dtype="float32",
        )

    def logits(self, last) -> np.ndarray:
        model = nnx.merge(self.loaded.graphdef, self.loaded.state)
        return np.asarray(model.head(last, NativeOps(self.runtime, None, "matrix")))[0]


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.write_checkpoint(folder, request.param)
    config = ModelConfig.from_hf(tiny_models.hf_config(request.param))
    runtime = CpuRuntime(num_threads=1)
    loaded = load_model(Checkpoint.open(folder), config, registry, runtime, compute_dtype="float32")
    yield Model(config, runtime, loaded)
    loaded.close()
    runtime.close()


def row_of(count: int, max_tokens: int, start: int = 0) -> StepRow:
    """Its pages in no order."""
    rng = np.random.default_rng(count)
    pages = rng.permutation(-(-max_tokens // 16))[: -(-(start + count) // 16)].tolist()
    return StepRow(rng.integers(1, 500, count).tolist(), start, pages, 0, None)


def assert_near(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=TOLERANCE * float(np.abs(want).max()))


def assert_same(model: Model, row: StepRow, want: tuple, got: tuple) -> None:
    """(logits, caches) of both."""
    assert_near(got[0], want[0])
    for layer in range(model.config.num_layers):
        for g, w in zip(cached(got[1], row, layer), cached(want[1], row, layer), strict=True):
            assert_near(g, w)


@pytest.mark.parametrize("lengths", [LENGTHS, pytest.param((4097,), marks=pytest.mark.slow)])
def test_chunks_and_streamed_layers_compute_what_one_step_does(model, lengths):
    room = max(lengths) + 16
    whole, chunks = model.plain(room, room, "vector"), model.plain(room, 128, "matrix")
    slp = model.slp(room)
    for count in lengths:
        row = row_of(count, room)
        want = whole.run(row), whole.caches
        assert_same(model, row, want, (chunks.run(row), chunks.caches))
        assert_same(model, row, want, (model.logits(slp.prefill(row)), slp._caches))
    slp.close()


def test_streamed_layers_go_on_from_what_is_cached(model):
    room = 320
    chunks, slp = model.plain(room, 128, "matrix"), model.slp(room)
    for first, second in ((16, 1), (250, 33), (255, 45)):
        whole = row_of(first + second, room)
        before = dataclasses.replace(whole, token_ids=whole.token_ids[:first])
        rest = dataclasses.replace(whole, token_ids=whole.token_ids[first:], start=first)
        slp.prefill(before)
        want = chunks.run(whole), chunks.caches
        assert_same(model, whole, want, (model.logits(slp.prefill(rest)), slp._caches))
    slp.close()


@pytest.mark.parametrize("rings", [(2, 24), pytest.param(RINGS, marks=pytest.mark.slow)])
def test_rings_of_any_length_stream_the_same(model, rings):
    """From two experts to all 24 of a layer."""
    chunks, row = model.plain(192, 128, "matrix"), row_of(129, 192)
    want, found = (chunks.run(row), chunks.caches), set()
    for experts in rings:
        slp = model.slp(192, experts)
        found.add(slp.plan.num_slots * slp.plan.group_experts)
        assert_same(model, row, want, (model.logits(slp.prefill(row)), slp._caches))
        assert slp.stats()["bytes"] == slp.streamed_bytes
        slp.close()
    assert found == set(rings)
