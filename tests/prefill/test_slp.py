"""Stream-loading prefill of tiny checkpoints on the CPU platform, against prefill in chunks."""

from __future__ import annotations

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
from jaxmoe.models import registry
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


def _slp(case) -> SlpDevice:
    _, _, config, runtime, loaded = case
    device = jax.local_devices(backend="cpu")[0]
    return SlpDevice(
        loaded,
        config,
        device,
        DeviceDriver.host(),
        runtime,
        max_prompt_tokens=80,
        free_bytes=1 << 30,
        chunk_tokens=CHUNK,
        compute_dtype="float32",
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
