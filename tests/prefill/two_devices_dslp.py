"""DSLP of tiny checkpoints on two CPU devices, against transformers' logits and plain prefill.

Collected by test_dslp.py only, in a process with two devices.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from support import tiny_models
from support.compare import mean_kl, relative_error
from support.parity import load_fixture
from support.tiny_runner import PAGE_SIZE, native_runner

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.models import registry
from jaxmoe.prefill.dslp_devices import DslpDevices
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.safetensors_reader import Checkpoint

CASES = ("deepseek_v3_fp8", "qwen3_moe_fp8", "deepseek_v3", "qwen3_moe")
CHUNK = 64
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
        model = nnx.merge(self.loaded.graphdef, self.loaded.state)
        return np.asarray(model.head(last, NativeOps(self.runtime, None, "matrix")))[0]


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
        one.loaded.close()
        one.runtime.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_logits_at_every_length_are_those_of_transformers(model, case, dtype):
    """Every beginning of the fixture's prompts is a prompt of its own, cut its own way."""
    fixture, it = load_fixture(case), model(case, dtype)
    dslp = it.devices(64)
    rng = np.random.default_rng(1)
    rows = []
    for prompt in fixture.prompts:
        for count in range(1, len(prompt) + 1):
            pages = rng.permutation(4).tolist()
            rows.append(it.logits(dslp.prefill(StepRow(prompt[:count], 0, pages, 0, None))))
    logits = np.stack(rows)
    dslp.close()
    if dtype == "float32":
        assert relative_error(logits, fixture.logits) <= FLOAT32_TOLERANCE
    else:
        theirs = mean_kl(fixture.logits_bf16, fixture.logits)
        assert mean_kl(logits, fixture.logits) <= theirs
        assert relative_error(logits, fixture.logits) > 1e-4
