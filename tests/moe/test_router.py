"""Routing against a brute-force reading of its definition."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config.model_config import RouterConfig
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.moe.router import Router, route

V2_LITE = RouterConfig(16, 6, "softmax", False, False, 1.0)
V2 = RouterConfig(24, 6, "softmax", False, False, 16.0, 8, 3, "max")
V3 = RouterConfig(24, 8, "sigmoid", True, True, 2.5, 8, 4, "top2_sum", 1e-20)
KIMI = dataclasses.replace(V3, num_groups=1, groups_per_token=1, weight_scale=2.827)
QWEN = RouterConfig(24, 8, "softmax", False, True, 1.0)


def brute_force(
    logits: np.ndarray, bias: np.ndarray | None, c: RouterConfig
) -> tuple[list[int], list[float]]:
    """One token, in Python: lists, sorts, and nothing clever."""
    logits = logits.astype(np.float64)
    if c.score == "softmax":
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores if bias is None else scores + bias
    size = c.num_experts // c.num_groups
    groups = []
    for g in range(c.num_groups):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        groups.append(members[0] if c.group_score == "max" else sum(members[:2]))
    best = sorted(range(c.num_groups), key=lambda g: (-groups[g], g))[: c.groups_per_token]
    allowed = [e for e in range(c.num_experts) if c.num_groups == 1 or e // size in best]
    chosen = sorted(allowed, key=lambda e: (-choice[e], e))[: c.experts_per_token]
    weights = [scores[e] for e in chosen]
    if c.renormalize:
        weights = [w / (sum(weights) + c.renormalize_eps) for w in weights]
    return chosen, [w * c.weight_scale for w in weights]


@pytest.mark.parametrize("config", [V2_LITE, V2, V3, KIMI, QWEN])
def test_against_brute_force(config: RouterConfig):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, config.num_experts)).astype(np.float32)
    bias = None
    if config.correction_bias:
        # Some scores below zero, where filling dropped groups with 0 would be wrong.
        bias = (rng.normal(size=config.num_experts) - 0.8).astype(np.float32)
    ids, weights = route(jnp.asarray(logits), None if bias is None else jnp.asarray(bias), config)
    for t in range(len(logits)):
        expected_ids, expected_weights = brute_force(logits[t], bias, config)
        assert np.asarray(ids)[t].tolist() == expected_ids
        np.testing.assert_allclose(np.asarray(weights)[t], expected_weights, rtol=2e-6)


def test_ties_go_to_lower_ids():
    logits = jnp.zeros((1, 24))
    assert route(logits, None, QWEN)[0].tolist() == [list(range(8))]
    # All groups tie too: the first four are kept, and their twelve experts are the first ones.
    assert route(logits, jnp.zeros(24), V3)[0].tolist() == [list(range(8))]
    some = jnp.zeros((1, 24)).at[0, 20].set(1.0)
    assert route(some, None, QWEN)[0].tolist() == [[20, 0, 1, 2, 3, 4, 5, 6]]


def test_bias_chooses_but_does_not_weigh():
    logits = jnp.linspace(-1.0, 1.0, 24)[None]
    bias = jnp.zeros(24).at[0].set(10.0)
    ids, weights = route(logits, bias, dataclasses.replace(KIMI, renormalize=False))
    assert ids[0, 0] == 0
    assert float(weights[0, 0]) == pytest.approx(2.827 / (1 + np.e), rel=1e-6)


def test_module_marks_padding_and_computes_in_float32():
    router = Router(KIMI, 32, "bf16")
    rng = np.random.default_rng(0)
    router.logits.data.set_value(jnp.asarray(rng.normal(size=(24, 32)), jnp.bfloat16))
    x = jnp.asarray(rng.normal(size=(4, 32)), jnp.float32)
    valid = jnp.asarray([True, False, True, False])
    ids, weights = router(x, valid, ReferenceOps())
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    assert (np.asarray(ids)[[1, 3]] == -1).all() and (np.asarray(ids)[[0, 2]] >= 0).all()
    logits = np.asarray(x) @ np.asarray(router.logits.data[...], np.float32).T
    for t in (0, 2):
        assert np.asarray(ids)[t].tolist() == brute_force(logits[t], np.zeros(24), KIMI)[0]
