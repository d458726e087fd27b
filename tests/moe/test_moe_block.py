"""The MoE block: routed plus shared experts, through the ops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import MoeConfig, RouterConfig
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.moe.moe_block import MoeBlock
from jaxmoe.weights.param_spec import describe

ROUTER = RouterConfig(4, 2, "softmax", False, True, 1.0)


def silu_mlp(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def test_routed_and_shared_are_summed():
    rng = np.random.default_rng(0)
    block = MoeBlock(MoeConfig(ROUTER, 6, 10), 1, 8, lambda path: "f32", "layers.2.mlp")
    mlps = {
        "router": block.router.logits,
        **{w: getattr(block.shared, w) for w in ("gate", "up", "down")},
    }
    for linear in mlps.values():
        linear.data.set_value(jnp.asarray(rng.normal(size=linear.data.shape), jnp.float32))
    experts = {
        "gate": rng.normal(size=(4, 6, 8)).astype(np.float32),
        "up": rng.normal(size=(4, 6, 8)).astype(np.float32),
        "down": rng.normal(size=(4, 8, 6)).astype(np.float32),
    }
    stored = {which: Weight(jnp.asarray(w)) for which, w in experts.items()}
    # The block is the second MoE layer: what the first one holds must not matter.
    other = {which: Weight(jnp.full_like(w.data, jnp.nan)) for which, w in stored.items()}
    x = rng.normal(size=(3, 8)).astype(np.float32)
    valid = jnp.asarray([True, True, False])
    y = block(jnp.asarray(x), valid, ReferenceOps([other, stored]), jnp.float32)

    logits = x @ np.asarray(block.router.logits.data[...]).T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for t in range(3):
        shared = silu_mlp(x[t], *(np.asarray(mlps[w].data[...]) for w in ("gate", "up", "down")))
        best = np.argsort(-probs[t])[:2]
        routed = sum(
            probs[t, e] * silu_mlp(x[t], *(experts[w][e] for w in ("gate", "up", "down")))
            for e in best
        )
        routed = routed / probs[t, best].sum() if t < 2 else 0.0
        np.testing.assert_allclose(y[t], shared + routed, rtol=1e-4, atol=1e-4)


def test_without_shared_experts_there_are_no_leaves_for_them():
    specs = describe(
        lambda: MoeBlock(MoeConfig(ROUTER, 6, 0), 0, 8, lambda path: "bf16", "layers.0.mlp")
    ).specs
    assert set(specs) == {"router.logits.data"}
    assert isinstance(specs["router.logits.data"].shape, tuple)
    assert jax.tree.leaves(specs)
