"""Multi-head latent attention, absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one vector a token for all heads: the normalised latent (C) and the rotated shared
key. The per-head up-projections of the latent are applied to the query and to the attention's
output instead of to every cached key and value: with k_n = W_uk_n c and v_n = W_uv_n c,

    q_n · k_n = (W_uk_nᵀ q_n) · c        sum_s p_s v_ns = W_uv_n (sum_s p_s c_s)

so attention reads C + rope values a position whatever the number of heads. Operations that say
they expand latents (`expands_latents`: GPUs, for prompts, where FLOPs bind) are given queries and
latents as they are, and make keys and values themselves.

Where the model has an indexer (indexer.py), each token attends only the positions it chooses, in
layers without one of their own those of the last before them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.attention.indexer import Indexer
from jaxmoe.config.model_config import IndexerConfig, MlaConfig, RopeConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.ffi.sparse import capacity
from jaxmoe.layers import rope
from jaxmoe.layers.linear import HeadLinear, Linear
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import Formats


class MlaAttention(nnx.Module):
    """Leaves: q | q_a, q_a_norm, q_b; kv_a, kv_a_norm, w_uk `[N, C, nope]`, w_uv `[N, v, C]`, o;
    indexer, where there is one.
    """

    def __init__(
        self,
        config: MlaConfig,
        rope_config: RopeConfig,
        hidden: int,
        formats: Formats,
        path: str,
        *,
        shares_choice: bool = False,
    ):
        c = config
        self.shares_choice = shares_choice
        self.config = config
        self.rope_config = rope_config
        q_out = c.num_heads * (c.nope_head_dim + c.rope_head_dim)
        if c.q_lora_rank is None:
            self.q = Linear(hidden, q_out, formats(f"{path}.q"))
        else:
            self.q_a = Linear(hidden, c.q_lora_rank, formats(f"{path}.q_a"))
            self.q_a_norm = RMSNorm(c.q_lora_rank, c.lora_norm_eps)
            self.q_b = Linear(c.q_lora_rank, q_out, formats(f"{path}.q_b"))
        self.kv_a = Linear(hidden, c.kv_lora_rank + c.rope_head_dim, formats(f"{path}.kv_a"))
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, c.lora_norm_eps)
        self.w_uk = HeadLinear(
            c.num_heads, c.nope_head_dim, c.kv_lora_rank, formats(f"{path}.w_uk")
        )
        self.w_uv = HeadLinear(c.num_heads, c.kv_lora_rank, c.v_head_dim, formats(f"{path}.w_uv"))
        self.o = Linear(c.num_heads * c.v_head_dim, hidden, formats(f"{path}.o"))
        if c.indexer is not None and not shares_choice:
            assert c.q_lora_rank is not None
            self.indexer = Indexer(c.indexer, c.q_lora_rank, hidden, formats, f"{path}.indexer")

    def __call__(
        self, x: jax.Array, cache: tuple[jax.Array, ...], step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, tuple[jax.Array, ...], StepInputs]:
        """`x [T, D]` to float32 `[T, D]`, the cache, `([P, Z, 1, C + rope],)` and with an indexer
        its keys, extended, and the step with what the indexer selected.
        """
        c = self.config
        num_tokens = x.shape[0]

        index_cache: tuple[jax.Array, ...] = ()
        if c.q_lora_rank is None:
            q = self.q(x, ops)
        else:
            q_latent = self.q_a_norm(self.q_a(x, ops, jnp.float32), ops).astype(x.dtype)
            q = self.q_b(q_latent, ops)
            if c.indexer is not None and not self.shares_choice:
                selected, index_keys = self.indexer(x, q_latent, cache[1], step, ops)
                index_cache = (index_keys,)
                step = dataclasses.replace(step, selected=selected)
        selected = None if c.indexer is None else step.selected
        if c.indexer is not None and selected is None:
            _check_all_fit(cache[0], step, c.indexer)
        q = q.reshape(num_tokens, c.num_heads, -1)
        q_nope, q_rope = q[..., : c.nope_head_dim], q[..., c.nope_head_dim :]
        q_rope = rope.apply(q_rope, step.positions, self.rope_config, ops)

        latent = self.kv_a(x, ops, jnp.float32)  # [T, C + rope]
        k_rope = latent[:, None, c.kv_lora_rank :]
        k_rope = rope.apply(k_rope, step.positions, self.rope_config, ops)
        latent = self.kv_a_norm(latent[:, None, : c.kv_lora_rank], ops)
        k_new = jnp.concatenate([latent, k_rope], axis=-1).astype(x.dtype)

        if ops.expands_latents and selected is None:
            values, cache = ops.attend_latents(
                jnp.concatenate([q_nope, q_rope.astype(x.dtype)], axis=-1),
                k_new,
                cache[:1],
                step,
                w_uk=self.w_uk.weight,
                w_uv=self.w_uv.weight,
                scale=c.softmax_scale,
            )  # [T, N, v]
            values = values.astype(x.dtype)
            y = self.o(values.reshape(num_tokens, -1), ops, jnp.float32)
            return y, (*cache, *index_cache), step
        q_absorbed = self.w_uk(q_nope, ops, jnp.float32)  # [T, N, C]
        attended, cache = ops.attend(
            jnp.concatenate([q_absorbed, q_rope], axis=-1).astype(x.dtype),
            k_new,
            None,
            cache[:1],
            step,
            scale=c.softmax_scale,
            v_dim=c.kv_lora_rank,
            selected=selected,
        )  # [T, N, C]
        values = self.w_uv(attended.astype(x.dtype), ops)  # [T, N, v]
        y = self.o(values.reshape(num_tokens, -1), ops, jnp.float32)
        return y, (*cache, *index_cache), step


def _check_all_fit(pages: jax.Array, step: StepInputs, indexer: IndexerConfig) -> None:
    """A step without a selection must be one that cannot need it; a choice that was lost on its way
    from another layer would be a wrong token.
    """
    page_size = pages.shape[1]
    assert capacity(step, page_size) < indexer.top_k + page_size, "no selection in this step"
