"""MLA and GQA over the paged cache against the textbook computation over whole sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.attention.gqa import GqaAttention
from jaxmoe.attention.mla import MlaAttention
from jaxmoe.config.model_config import GqaConfig, MlaConfig, RopeConfig
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.ffi.reference import ReferenceOps

D, T = 32, 7
MLA = MlaConfig(3, 24, 40, 16, 8, 12, softmax_scale=0.3)
GQA = GqaConfig(4, 2, 16, softmax_scale=0.25, qk_norm="head")


def fill(module: nnx.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Random leaves; returns them by path."""
    rng = np.random.default_rng(seed)
    values = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = rng.normal(size=variable.shape).astype(np.float32) / variable.shape[-1] ** 0.5
        if path[-1] == "weight":
            value = 1 + value
        variable.set_value(jnp.asarray(value))
        values[".".join(str(p) for p in path[:-1])] = value
    return values


def whole_step() -> StepInputs:
    """T tokens of one sequence on pages 2 and 0 of 4 positions."""
    at = np.arange(T, dtype=np.int32)
    slots = np.array([2, 0], np.int32)[at // 4] * 4 + at % 4
    return StepInputs(
        *(jnp.asarray(a) for a in (at, at, np.zeros(T, np.int32), slots, np.array([[2, 0]])))
    )


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """`[T, N, dim]` at positions 0..T-1, pairs turned as complex numbers."""
    half = x.shape[-1] // 2
    pairs = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Causal attention, one KV head a query head."""
    out = np.zeros((T, q.shape[1], v.shape[2]))
    for t in range(T):
        for n in range(q.shape[1]):
            scores = np.exp(k[: t + 1, n] @ q[t, n] * scale)
            out[t, n] = scores @ v[: t + 1, n] / scores.sum()
    return out


def run(module: Any, pages: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(9).normal(size=(T, D)).astype(np.float32)
    cache = tuple(jnp.zeros((3, 4, heads, dim)) for heads, dim in pages)
    y, cache, *_ = module(jnp.asarray(x), cache, whole_step(), ReferenceOps())
    assert y.dtype == jnp.float32 and len(cache) == len(pages)
    return x, np.asarray(y)


def test_absorbed_mla_is_expanded_mla():
    module = MlaAttention(MLA, RopeConfig(8, 50.0, True), D, lambda path: "f32", "a")
    w = fill(module)
    x, y = run(module, [(1, 48)])

    q = norm(x @ w["q_a"].T, w["q_a_norm"], 1e-6) @ w["q_b"].T
    q = q.reshape(T, 3, 24)
    kv = x @ w["kv_a"].T
    latent = norm(kv[:, :40], w["kv_a_norm"], 1e-6)
    k_nope = np.einsum("tc,ncd->tnd", latent, w["w_uk"])
    values = np.einsum("tc,nvc->tnv", latent, w["w_uv"])
    k_rope = rotate(kv[:, None, 40:], 50.0, True).repeat(3, axis=1)
    q = np.concatenate([q[..., :16], rotate(q[..., 16:], 50.0, True)], axis=-1)
    out = attend(q, np.concatenate([k_nope, k_rope], axis=-1), values, 0.3)
    np.testing.assert_allclose(y, out.reshape(T, -1) @ w["o"].T, rtol=1e-4, atol=1e-5)


def test_gqa_with_qk_norm():
    module = GqaAttention(GQA, RopeConfig(16, 50.0, False), D, 1e-3, lambda path: "f32", "a")
    w = fill(module)
    x, y = run(module, [(2, 16), (2, 16)])

    q = norm((x @ w["q"].T).reshape(T, 4, 16), w["q_norm"], 1e-3)
    k = norm((x @ w["k"].T).reshape(T, 2, 16), w["k_norm"], 1e-3)
    v = (x @ w["v"].T).reshape(T, 2, 16).repeat(2, axis=1)
    k = rotate(k, 50.0, False).repeat(2, axis=1)
    out = attend(rotate(q, 50.0, False), k, v, 0.25)
    np.testing.assert_allclose(y, out.reshape(T, -1) @ w["o"].T, rtol=1e-4, atol=1e-5)


def test_gqa_with_biases_row_norm_clipping_and_partial_rotation():
    config = dataclasses.replace(GQA, qk_norm="row", qkv_bias=True, qkv_clip=0.8)
    module = GqaAttention(config, RopeConfig(8, 50.0, False), D, 1e-3, lambda path: "f32", "a")
    w = fill(module)
    b = {name: np.asarray(getattr(module, name).bias[...]) for name in "qkv"}
    x, y = run(module, [(2, 16), (2, 16)])

    w = {name: np.asarray(getattr(module, name).data[...]) for name in "qkvo"} | {
        name: w[name] for name in ("q_norm", "k_norm")
    }
    q = norm(x @ w["q"].T + b["q"], w["q_norm"], 1e-3)
    k = norm(x @ w["k"].T + b["k"], w["k_norm"], 1e-3)
    q, k, v = (np.clip(a, -0.8, 0.8) for a in (q, k, x @ w["v"].T + b["v"]))
    q, k, v = q.reshape(T, 4, 16), k.reshape(T, 2, 16), v.reshape(T, 2, 16)
    q, k = (np.concatenate([rotate(a[..., :8], 50.0, False), a[..., 8:]], axis=-1) for a in (q, k))
    out = attend(q, k.repeat(2, axis=1), v.repeat(2, axis=1), 0.25)
    np.testing.assert_allclose(y, out.reshape(T, -1) @ w["o"].T, rtol=1e-4, atol=1e-5)


def test_leaves_follow_the_configuration():
    rope = RopeConfig(8, 50.0, True)
    plain = MlaAttention(MlaConfig(3, None, 40, 16, 8, 12, 0.3), rope, D, lambda path: "f32", "a")
    assert not hasattr(plain, "q_a") and plain.q.data.shape == (72, D)
    without = GqaConfig(4, 2, 16, 0.25, qk_norm="none")
    module = GqaAttention(without, RopeConfig(16, 50.0, False), D, 1e-6, lambda path: "f32", "a")
    assert not hasattr(module, "q_norm")
