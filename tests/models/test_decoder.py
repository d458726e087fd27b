"""The decoder as a description, as a step, and as something to train."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import tiny_models

from jaxmoe import models
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.ops import StepInputs, Weight
from jaxmoe.ffi.reference import BatchedSequenceOps, ReferenceOps

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 0,
}


# Compiling takes most of the time of these small models.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def small_model(**changes: Any) -> tuple[ModelConfig, Any, Any, Any]:
    """A DeepSeek-V3 in float32: config, graphdef, state, experts."""
    hf = tiny_models.hf_config("deepseek_v3") | SMALL | {"dtype": "float32"} | changes
    config = ModelConfig.from_hf(hf)
    described = models.describe_model(config, "float32", models.configured_formats(config))
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32)

    state = described.fill({path: random(spec.shape) for path, spec in described.specs.items()})
    shapes = {"gate": (8, 16, 32), "up": (8, 16, 32), "down": (8, 32, 16)}
    experts = [{w: Weight(random(s)) for w, s in shapes.items()} for _ in config.moe_layers]
    return config, described.graphdef, state, experts


def step_of(rows: list[list[int]], padding: int) -> StepInputs:
    """Whole sequences of at most 8 tokens, one page each."""
    parts = []
    for r, tokens in enumerate(rows):
        at = np.arange(len(tokens))
        parts.append(np.stack([tokens, at, np.full(len(at), r), r * 8 + at]))
    parts.append(np.full((4, padding), -1))
    packed = np.concatenate(parts, axis=1).astype(np.int32)
    tables = np.arange(len(rows), dtype=np.int32)[:, None]
    return StepInputs(*(jnp.asarray(a) for a in (*packed, tables)))


def run(model: tuple[Any, ...], rows: list[list[int]], padding: int = 0) -> np.ndarray:
    config, graphdef, state, experts = model
    spec = models.cache_spec(config, "float32")
    caches = [tuple(jnp.zeros((3, 8, a.num_heads, a.head_dim)) for a in layer) for layer in spec]
    step = step_of(rows, padding)
    wanted = jnp.arange(sum(len(r) for r in rows))

    def call(state: Any, experts: Any) -> jax.Array:
        return nnx.merge(graphdef, state)(step, caches, ReferenceOps(experts), wanted)[0]

    return np.asarray(jit(call)(state, experts))


@pytest.mark.parametrize(
    ("case", "heads_and_dims"),
    [
        ("deepseek_v3", [(1, 576)]),
        ("deepseek_v32_fp8", [(1, 576), (1, 128)]),
        ("qwen3_moe", [(2, 128), (2, 128)]),
    ],
)
def test_cache_spec(case: str, heads_and_dims: list[tuple[int, int]]):
    config = ModelConfig.from_hf(tiny_models.hf_config(case))
    spec = models.cache_spec(config, "bfloat16")
    assert len(spec) == config.num_layers
    assert all([array[:2] for array in layer] == heads_and_dims for layer in spec)
    assert spec[0][0].dtype == jnp.bfloat16


def test_describing_a_flagship_allocates_nothing():
    hf = tiny_models.hf_config("deepseek_v3") | {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "num_hidden_layers": 61,
        "q_lora_rank": 1536,
        "vocab_size": 129280,
    }
    config = ModelConfig.from_hf(hf)
    start = time.monotonic()
    described = models.describe_model(config, "bfloat16", models.configured_formats(config))
    assert time.monotonic() - start < 60
    total = sum(int(np.prod(s.shape)) for s in described.specs.values())
    assert 16e9 < total < 20e9  # attention, shared experts, embeddings of a 671B model
    leaves = jax.tree.leaves(described._state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_padding_and_company_change_nothing():
    model = small_model()
    alone = run(model, [[3, 1, 4, 1, 5]])
    padded = run(model, [[3, 1, 4, 1, 5]], padding=6)
    together = run(model, [[3, 1, 4, 1, 5], [9, 2, 6]])
    np.testing.assert_allclose(padded, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together[:5], alone, rtol=1e-5, atol=1e-6)


def test_parts_make_up_the_whole():
    config, graphdef, state, experts = small_model()
    model, ops = nnx.merge(graphdef, state), BatchedSequenceOps(experts, 1)
    step = step_of([[3, 1, 4]], 0)
    h = model.embed(step.token_ids)
    for i in range(config.num_layers):
        attended, cache, _ = model.attention(i, h, (), step, ops)
        h, *_ = model.layer(i, h, (), step, ops)
        assert cache == ()
        np.testing.assert_allclose(model.mlp(i, attended, step, ops), h, rtol=1e-5, atol=1e-6)
    whole, _ = model(step, [()] * config.num_layers, ops, jnp.asarray([2, 0]))
    np.testing.assert_allclose(model.head(h, ops)[jnp.asarray([2, 0])], whole, rtol=1e-5, atol=1e-6)


def test_tied_embeddings():
    model = small_model(tie_word_embeddings=True)
    _, graphdef, state, experts = model
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    assert not any(path.startswith("lm_head") for path in paths)
    decoder = nnx.merge(graphdef, state)
    x = jnp.ones((1, 32))
    expected = decoder.final_norm(x, ReferenceOps()) @ decoder.embedding.data[...].T
    np.testing.assert_allclose(decoder.head(x, ReferenceOps(experts)), expected, rtol=1e-5)


def test_every_leaf_and_expert_has_a_gradient():
    """Through the training form of the ops; the bias that only chooses has none, by design."""
    config, graphdef, state, experts = small_model()
    step = step_of([list(range(8)), list(range(20, 28)), list(range(30, 38))], 0)

    def loss(state: Any, experts: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        ops = BatchedSequenceOps(experts, 3)
        logits, _ = model(step, [()] * config.num_layers, ops, jnp.arange(24))
        return -jax.nn.log_softmax(logits)[jnp.arange(24), step.token_ids].mean()

    gradients = jit(jax.grad(loss, argnums=(0, 1)))(state, experts)
    for path, leaf in nnx.to_flat_state(gradients[0]):
        size = float(jnp.abs(leaf[...]).max())
        assert np.isfinite(size)
        assert (size > 0) == ("correction_bias" not in path), path
    for leaf in jax.tree.leaves(gradients[1]):
        assert np.isfinite(leaf).all() and float(jnp.abs(leaf).max()) > 0
