"""The draft head against its definition, written out in numpy from DeepSeek-V3's report and the
layout of published checkpoints: no absorbed attention, no cache, no kernels. Those of other
families and formats against a model of that one layer, whose kind is held to transformers.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import draft_models, tiny_models
from support.tiny_runner import stored_formats, weights_of

from jaxmoe import models
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.models.decoder import cache_spec

NUM_TOKENS = 11
PAGE_SIZE = 4
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


class Written:
    """The head of `draft_models` over a whole text, in float64."""

    def __init__(self, tensors, config):
        self.tensors, self.c = tensors, config

    def w(self, name):
        return self.tensors[name].astype(np.float64)

    def of_layer(self, name):
        return self.w(f"{draft_models.DRAFT}.{name}.weight")

    def norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * weight

    def rope(self, x):
        """`[T, ..., R]`, pairs of neighbours turned by the position's angles."""
        dim = x.shape[-1]
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
        angles = angles.reshape(len(x), *[1] * (x.ndim - 2), dim // 2)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
        turned[..., 1::2] = even * np.sin(angles) + odd * np.cos(angles)
        return turned

    def attention(self, x):
        c = self.c
        heads, nope, v = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
        latent_dim = c["kv_lora_rank"]
        q_latent = self.norm(
            x @ self.of_layer("self_attn.q_a_proj").T, self.of_layer("self_attn.q_a_layernorm")
        )
        q = (q_latent @ self.of_layer("self_attn.q_b_proj").T).reshape(len(x), heads, -1)
        kv = x @ self.of_layer("self_attn.kv_a_proj_with_mqa").T
        latent = self.norm(kv[:, :latent_dim], self.of_layer("self_attn.kv_a_layernorm"))
        k_rope = self.rope(kv[:, latent_dim:])
        up = (latent @ self.of_layer("self_attn.kv_b_proj").T).reshape(len(x), heads, nope + v)
        q_rope = self.rope(q[..., nope:])
        scores = np.einsum("tnd,snd->nts", q[..., :nope], up[..., :nope])
        scores += np.einsum("tnd,sd->nts", q_rope, k_rope)
        scores /= np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("nts,snd->tnd", weights, up[..., nope:]).reshape(len(x), -1)
        return y @ self.of_layer("self_attn.o_proj").T

    def mlp(self, x, name):
        gate = x @ self.of_layer(f"{name}.gate_proj").T
        return (gate / (1 + np.exp(-gate)) * (x @ self.of_layer(f"{name}.up_proj").T)) @ (
            self.of_layer(f"{name}.down_proj").T
        )

    def experts(self, x):
        c = self.c
        scores = 1 / (1 + np.exp(-x @ self.of_layer("mlp.gate").T))
        choice = scores + self.w(f"{draft_models.DRAFT}.mlp.gate.e_score_correction_bias")
        groups = choice.reshape(len(x), c["n_group"], -1)
        best_two = np.sort(groups, axis=-1)[..., -2:].sum(-1)
        y = self.mlp(x, "mlp.shared_experts")
        for t in range(len(x)):
            allowed = np.argsort(best_two[t])[-c["topk_group"] :]
            masked = np.full(groups.shape[1:], -np.inf)
            masked[allowed] = groups[t, allowed]
            chosen = np.argsort(masked.reshape(-1))[-c["num_experts_per_tok"] :]
            weights = scores[t, chosen] / scores[t, chosen].sum() * c["routed_scaling_factor"]
            for expert, weight in zip(chosen, weights, strict=True):
                y[t] += weight * self.mlp(x[t : t + 1], f"mlp.experts.{expert}")[0]
        return y

    def __call__(self, h, next_ids):
        """Logits `[T, V]`, and what takes the place of `h [T, D]`, the final norm's result, where
        the head goes on."""
        embedded = self.w("model.embed_tokens.weight")[next_ids]
        parts = [self.norm(embedded, self.of_layer("enorm")), self.norm(h, self.of_layer("hnorm"))]
        x = np.concatenate(parts, axis=-1) @ self.of_layer("eh_proj").T
        x = x + self.attention(self.norm(x, self.of_layer("input_layernorm")))
        x = x + self.experts(self.norm(x, self.of_layer("post_attention_layernorm")))
        x = self.norm(x, self.of_layer("shared_head.norm"))
        return x @ self.w("lm_head.weight").T, x


def heads_own(hf, tensors):
    """The decoder's own head: a function of h and the next tokens."""
    config = ModelConfig.from_hf(hf).with_draft()
    described, (state, experts) = weights_of(config, tensors, "float32")
    model, ops = nnx.merge(described.graphdef, state), ReferenceOps(experts)

    def run(h, next_ids, parts=(NUM_TOKENS,)):
        (arrays,) = cache_spec(config, "float32")[-1:]
        cache = tuple(jnp.zeros((4, PAGE_SIZE, a.num_heads, a.head_dim), a.dtype) for a in arrays)
        table, out, at = np.array([[2, 0, 3]], np.int32), [], 0
        for count in parts:
            # Padded to the whole text, so that one program does for all.
            where = np.minimum(np.arange(at, at + NUM_TOKENS, dtype=np.int32), NUM_TOKENS - 1)
            slots = table[0][where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE
            rows = np.zeros(NUM_TOKENS, np.int32)
            rows[count:] = slots[count:] = -1
            step = StepInputs(*map(jnp.asarray, (rows, where, rows, slots, table)))
            x, cache = model.draft_layer(
                jnp.asarray(h[where], jnp.float32), jnp.asarray(next_ids[where]), cache, step, ops
            )
            out.append((np.asarray(model.logits(x, ops))[:count], np.asarray(x)[:count]))
            at += count
        return tuple(np.concatenate(part) for part in zip(*out, strict=True))

    return run


@pytest.fixture(scope="module")
def head():
    """The decoder's own head, and the written one."""
    hf, tensors = draft_models.hf_config(**PLAIN_ROPE), draft_models.make_tensors()
    return heads_own(hf, tensors), Written(tensors, hf)


def text(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((NUM_TOKENS, 256)), rng.integers(0, 512, NUM_TOKENS)


def test_logits_are_those_of_the_definition(head):
    run, written = head
    h, next_ids = text(0)
    logits, x = run(h, next_ids)
    expected, expected_x = written(h, next_ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(x, expected_x, rtol=0, atol=2e-4 * np.abs(expected_x).max())


def test_a_text_in_parts_goes_through_the_cache(head):
    run, _ = head
    h, next_ids = text(1)
    np.testing.assert_allclose(
        run(h, next_ids, (6, 1, 4))[0], run(h, next_ids)[0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "name", ["enorm", "hnorm", "shared_head.norm", "eh_proj", "self_attn.o_proj"]
)
def test_every_part_of_the_head_shows_in_its_logits(head, name):
    run, written = head
    h, next_ids = text(0)
    tensor = f"{draft_models.DRAFT}.{name}.weight"
    rolled = np.roll(written.tensors[tensor], 1, axis=-1)
    other = Written({**written.tensors, tensor: rolled}, written.c)
    expected, _ = other(h, next_ids)
    assert np.abs(run(h, next_ids)[0] - expected).max() > 1e-2 * np.abs(expected).max()


def test_the_heads_tensors_have_their_places_and_its_copies_are_not_read():
    config = ModelConfig.from_hf(draft_models.hf_config())
    tensors = draft_models.make_tensors()
    prefix = draft_models.DRAFT + "."
    own = {name for name in tensors if name.startswith(prefix)}
    assert all(map(models.name_map(config, {}).ignored, own))
    config = config.with_draft()
    formats = stored_formats(config, tensors)
    described = models.describe_model(config, "bfloat16", formats)
    names = models.name_map(config, described.specs, formats)
    used = {t.name for path in described.specs for t in names.tensors_for(path).tensors}
    for expert in range(config.moe.router.num_experts):
        for which in ("gate", "up", "down"):
            used.add(names.expert_tensor(config.num_layers, expert, which))
    assert own - used == {f"{prefix}embed_tokens.weight"}
    assert names.ignored(f"{prefix}embed_tokens.weight")
    assert names.ignored(f"{prefix}shared_head.head.weight")
    assert not any(map(names.ignored, own & used))


@pytest.mark.parametrize(
    "case",
    [
        "glm4_moe_fp8",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("glm4_moe", "glm4_moe_lite", "deepseek_v31_fp8")
        ),
    ],
)
def test_it_is_an_ordinary_layer_over_the_joined_embeddings(case):
    hf, tensors = tiny_models.hf_config(case), dict(tiny_models.make_tensors(case))
    prefix = f"model.layers.{hf['num_hidden_layers']}."
    rng = np.random.default_rng(0)
    h = rng.standard_normal((NUM_TOKENS, hf["hidden_size"]))
    next_ids = rng.integers(0, hf["vocab_size"], NUM_TOKENS)
    logits, _ = heads_own(hf, tensors)(h, next_ids)

    def norm(x, name):
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + hf["rms_norm_eps"])
        return x / scale * tensors[f"{prefix}{name}.weight"].astype(np.float64)

    embedded = tensors["model.embed_tokens.weight"].astype(np.float64)
    parts = norm(embedded[next_ids], "enorm"), norm(h, "hnorm")
    join = tensors[f"{prefix}eh_proj.weight"].astype(np.float64)
    table = np.zeros_like(embedded, np.float32)
    table[:NUM_TOKENS] = np.concatenate(parts, axis=-1) @ join.T
    layer = {n: t for n, t in tensors.items() if n.startswith(prefix)}
    model = {n.replace(prefix, "model.layers.0."): t for n, t in layer.items()}
    model["model.embed_tokens.weight"] = table
    model["model.norm.weight"] = tensors[f"{prefix}shared_head.norm.weight"]
    model["lm_head.weight"] = tensors["lm_head.weight"]
    one = dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    config = ModelConfig.from_hf(hf | one)
    described, (state, experts) = weights_of(config, model, "float32")
    decoder, ops = nnx.merge(described.graphdef, state), ReferenceOps(experts)
    (arrays,) = cache_spec(config, "float32")
    cache = tuple(jnp.zeros((3, PAGE_SIZE, a.num_heads, a.head_dim), a.dtype) for a in arrays)
    where = jnp.arange(NUM_TOKENS, dtype=jnp.int32)
    step = StepInputs(where, where, jnp.zeros_like(where), where, jnp.array([[0, 1, 2]]))
    expected, _ = decoder(step, [cache], ops, where)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
