"""The multi-token-prediction head that some checkpoints ship (DeepSeek-V3, arXiv 2412.19437,
section 2.2): it guesses the token after the next one, for speculative decoding.

With h_i the model's output at position i after its final norm, and t_{i+1} the token that follows:

    x_i = join [embedding_norm(emb(t_{i+1})), hidden_norm(h_i)]      y_i = norm(layer(x_i))

and the model's own output head makes of y_i logits of t_{i+2}. The layer is an ordinary one with a
cache of its own, in which entry i is of h_i and t_{i+1}, so that it shares the model's pages. Only
the first head is run; to guess further, y_i takes h_{i+1}'s place. Embedding and output head are
the model's, as published models share them: their copies in the checkpoint are not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.ffi.ops import Ops
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.weights.param_spec import Formats


class DraftHead(nnx.Module):
    """Leaves: embedding_norm, hidden_norm, join `[D, 2 D]`, norm; the layer is the decoder's."""

    def __init__(self, hidden: int, norm_eps: float, norm_offset: float, formats: Formats):
        self.embedding_norm = RMSNorm(hidden, norm_eps, norm_offset)
        self.hidden_norm = RMSNorm(hidden, norm_eps, norm_offset)
        self.join = Linear(2 * hidden, hidden, formats("draft.join"))
        self.norm = RMSNorm(hidden, norm_eps, norm_offset)

    def __call__(self, embedded: jax.Array, h: jax.Array, ops: Ops, dtype: jnp.dtype) -> jax.Array:
        """What the layer is given, float32 `[T, D]`, of the next tokens' embeddings and the final
        norm's result, float32 `[T, D]` both. dtype: of what the linear map reads.
        """
        parts = [self.embedding_norm(embedded, ops), self.hidden_norm(h, ops)]
        return self.join(jnp.concatenate(parts, axis=-1).astype(dtype), ops, jnp.float32)
