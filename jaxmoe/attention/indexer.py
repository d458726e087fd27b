"""The indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556 section 2.1).

Small heads of its own score every cached position against a token; only the `top_k` best are
attended. The keys, one a position for all heads, have a page array beside the latents', so that
pages, prefix cache and preemption serve both. While a context is no longer than `top_k` everything
is chosen, and attention is exactly the dense one.

The published code turns queries and keys by a Hadamard matrix and rounds them to FP8; their
products are the same without, and exact here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import IndexerConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.layers import rope
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import LayerNorm
from jaxmoe.weights.param_spec import Formats


class Indexer(nnx.Module):
    """Leaves: q `[N * H, R]` of the query's latent, k `[H, D]`, k_norm, head_weights `[N, D]`."""

    def __init__(
        self, config: IndexerConfig, q_lora_rank: int, hidden: int, formats: Formats, path: str
    ):
        c = config
        self.config = config
        self.q = Linear(q_lora_rank, c.num_heads * c.head_dim, formats(f"{path}.q"))
        self.k = Linear(hidden, c.head_dim, formats(f"{path}.k"))
        self.k_norm = LayerNorm(c.head_dim, c.norm_eps)
        self.head_weights = Linear(hidden, c.num_heads, formats(f"{path}.head_weights"))

    def __call__(
        self, x: jax.Array, q_latent: jax.Array, pages: jax.Array, step: StepInputs, ops: Ops
    ) -> tuple[jax.Array | None, jax.Array]:
        """`x [T, D]` and the query's latent `[T, R]` to what each token attends, and the pages
        `[P, Z, 1, H]`, extended: as `Ops.select` returns them.
        """
        c, num_tokens = self.config, x.shape[0]
        q = self.q(q_latent, ops, jnp.float32).reshape(num_tokens, c.num_heads, c.head_dim)
        k = self.k_norm(self.k(x, ops, jnp.float32), ops)[:, None]
        scale = (c.num_heads * c.head_dim) ** -0.5
        return ops.select(
            rope.apply(q, step.positions, c.rope, ops).astype(x.dtype),
            self.head_weights(x, ops, jnp.float32) * scale,
            rope.apply(k, step.positions, c.rope, ops).astype(x.dtype),
            pages,
            step,
            top_k=c.top_k,
        )
