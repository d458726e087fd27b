"""What is DeepSeek-V4's alone, turned off: parity must notice.

On the CPU kernels, since its prompts are long. Weights are changed as they are held, so that one
compiled program serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import saved_v4
from support.compare import relative_error
from support.parity import load_fixture
from support.tiny_runner import TinyRunner, native_runner

from jaxmoe.config.model_config import CompressedConfig, ModelConfig
from jaxmoe.layers import rope
from jaxmoe.weights.param_spec import dotted

CASE = "deepseek_v4"
MUST_EXCEED = 2e-3
STEP_TOKENS = 272

pytest.importorskip("jaxmoe.ffi._native")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("v4") / CASE


def error(runner: TinyRunner) -> float:
    """Of the prompt that has more entries than are chosen."""
    fixture = load_fixture(CASE)
    prompt = fixture.prompts[0]
    (logits,) = runner.step([prompt], STEP_TOKENS)
    return relative_error(logits, fixture.logits[: len(prompt)])


def _changed(state: Any, suffix: str, change: Callable[[Any], Any]) -> Any:
    flat, count = [], 0
    for path, variable in nnx.to_flat_state(state):
        if dotted(path).endswith(suffix):
            variable, count = variable.replace(change(variable[...])), count + 1
        flat.append((path, variable))
    assert count, suffix
    return nnx.from_flat_state(flat)


WEIGHTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no sinks": ("attention.sinks", lambda a: jnp.full_like(a, -1e4)),
    "no hash router": ("expert_table", lambda a: jnp.roll(a, 1, axis=0)),
    "no correction bias": ("correction_bias", jnp.zeros_like),
    "no bias of positions in an entry": ("attention.compressor.position_bias", jnp.zeros_like),
    "nor in an indexer's": ("indexer.compressor.position_bias", jnp.zeros_like),
    "no head weights of the indexer": ("indexer.head_weights.data", jnp.ones_like),
    "streams mixed by their content alone": ("streams.base", jnp.zeros_like),
    "streams mixed by their number alone": ("streams.scale", jnp.zeros_like),
    "streams summed at the end": ("streams_head.scale", jnp.zeros_like),
}


def test_changed_weights_are_noticed(folder: Path):
    runner = native_runner(CASE, "float32", folder, "vector")
    loaded = runner.keep[0]
    assert error(runner) <= 1e-4
    for name, (suffix, change) in WEIGHTS.items():
        runner.change_weights(_changed(loaded.state, suffix, change))
        assert error(runner) > MUST_EXCEED, name


def _attention(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    def apply(config: ModelConfig) -> ModelConfig:
        assert isinstance(config.attention, CompressedConfig)
        attention = dataclasses.replace(config.attention, **changes)
        return dataclasses.replace(config, attention=attention)

    return apply


def _of_entries(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    def apply(config: ModelConfig) -> ModelConfig:
        assert isinstance(config.attention, CompressedConfig)
        turned = dataclasses.replace(config.attention.compressed_rope, **changes)
        return _attention(compressed_rope=turned)(config)

    return apply


def _moe(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    def apply(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))

    return apply


def _streams(config: ModelConfig) -> ModelConfig:
    assert config.streams is not None
    streams = dataclasses.replace(config.streams, sinkhorn_iterations=1)
    return dataclasses.replace(config, streams=streams)


CONFIGS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "one entry fewer": _attention(index_top_k=23),
    "a window of 127": _attention(window=127),
    "entries turned as the window's layer": _of_entries(theta=10000.0),
    "no YaRN": _of_entries(scaling=None),
    "the shared expert not clamped": _moe(shared_activation=None),
    "the routed experts not clamped": _moe(activation=None),
    "one iteration of Sinkhorn": _streams,
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", CONFIGS)
def test_mutation_is_noticed(mutation: str, folder: Path):
    assert error(native_runner(CASE, "float32", folder, "vector", CONFIGS[mutation])) > MUST_EXCEED


@pytest.mark.slow
def test_outputs_that_stay_turned_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    undo = rope.undo
    monkeypatch.setattr(rope, "undo", lambda x, at, *rest: undo(x, jnp.zeros_like(at), *rest))
    assert error(native_runner(CASE, "float32", folder, "vector")) > MUST_EXCEED


@pytest.mark.slow
def test_a_checkpoint_that_transformers_saved(tmp_path: Path):
    saved = saved_v4.write(tmp_path / "saved")
    config = ModelConfig.from_hf(saved_v4.config())
    assert error(native_runner(CASE, "float32", saved, "vector", lambda _: config)) < 1e-4


def test_the_prompts_cross_every_border():
    lengths = [len(prompt) for prompt in load_fixture(CASE).prompts]
    decoded = load_fixture(CASE).greedy_tokens.shape[1]
    assert lengths[0] >= 2 * 128 and lengths[0] // 4 > 24
    assert lengths[1] < 128 < lengths[1] + decoded - 1
    assert np.isfinite(load_fixture(CASE).logits).all()
