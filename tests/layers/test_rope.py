"""Rotary embedding against DeepSeek's published formulas, and its defining property."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config.model_config import RopeConfig, YarnScaling
from jaxmoe.layers import rope


def published_yarn(dim: int, base: float, y: YarnScaling) -> list[float]:
    """`DeepseekV3YarnRotaryEmbedding._set_cos_sin_cache`, in plain Python."""

    def correction_dim(rotations: float) -> float:
        turns = y.original_max_position / (rotations * 2 * math.pi)
        return (dim * math.log(turns)) / (2 * math.log(base))

    low, high = correction_dim(y.beta_fast), correction_dim(y.beta_slow)
    if y.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    result = []
    for i in range(dim // 2):
        extra = 1.0 / base ** (2 * i / dim)
        inter = extra / y.factor
        mask = 1.0 - min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(inter * (1 - mask) + extra * mask)
    return result


@pytest.mark.parametrize(
    ("theta", "yarn"),
    [
        (1e4, YarnScaling(40.0, 4096)),  # DeepSeek
        (5e4, YarnScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0)),  # Kimi-K2
        (1.5e5, YarnScaling(32.0, 4096, truncate=False)),
        (1e6, YarnScaling(4.0, 32768)),  # Qwen3, extended
    ],
)
def test_yarn_frequencies(theta: float, yarn: YarnScaling):
    config = RopeConfig(64, theta, interleaved=True, scaling=yarn)
    expected = published_yarn(64, theta, yarn)
    np.testing.assert_allclose(rope.inverse_frequencies(config), expected, rtol=2e-7)


def test_beta_one_one_is_a_step_from_plain_to_interpolated():
    yarn = YarnScaling(32.0, 4096, beta_fast=1.0, beta_slow=1.0)
    plain = rope.inverse_frequencies(RopeConfig(64, 5e4, True))
    ratio = plain / rope.inverse_frequencies(RopeConfig(64, 5e4, True, yarn))
    np.testing.assert_allclose(np.unique(np.round(ratio, 3))[[0, -1]], [1.0, 32.0])
    assert ((ratio < 1.001) | (ratio > 31.9)).sum() >= 31


@pytest.mark.parametrize(
    ("yarn", "expected"),
    [
        (None, 1.0),
        (YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0), 1.0),
        (YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.707), 1.0),
        (YarnScaling(4.0, 32768), 0.1 * math.log(4.0) + 1.0),
        (YarnScaling(4.0, 32768, attention_factor=1.25), 1.25),
        (YarnScaling(1.0, 4096), 1.0),
        (
            YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=0.5),
            (0.1 * math.log(40.0) + 1.0) / (0.05 * math.log(40.0) + 1.0),
        ),
    ],
)
def test_attention_factor(yarn: YarnScaling | None, expected: float):
    assert rope.attention_factor(RopeConfig(64, 1e4, True, yarn)) == pytest.approx(expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_pairs_and_norm(interleaved: bool):
    config = RopeConfig(8, 100.0, interleaved)
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    positions = np.array([0, 1, 5000], np.int32)
    cos, sin = rope.cos_sin(jnp.asarray(positions), config)
    y = np.asarray(rope.rotate(jnp.asarray(x), cos, sin, interleaved=interleaved))
    for t, position in enumerate(positions):
        for i in range(4):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
            turn = complex(*x[t, 0, [first, second]]) * np.exp(1j * position * 100.0 ** (-i / 4))
            np.testing.assert_allclose(y[t, 0, [i, i + 4]], [turn.real, turn.imag], atol=2e-3)


def test_dot_products_depend_on_distance_alone():
    config = RopeConfig(64, 1e4, True, YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 64)).astype(np.float32)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        cos, sin = rope.cos_sin(jnp.asarray([position]), config)
        return np.asarray(rope.rotate(jnp.asarray(x), cos, sin, interleaved=True)).ravel()

    near = rotated(q, 17) @ rotated(k, 12)
    far = rotated(q, 1017) @ rotated(k, 1012)
    assert near == pytest.approx(far, abs=1e-3)
    assert abs(near - rotated(q, 17) @ rotated(k, 2)) > 0.1
