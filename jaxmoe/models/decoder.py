"""The decoder all supported models share, described for one layer at a time.

`Decoder` holds no state but its weights and calls no machine but `Ops`. `embed`, `attention(i)`,
`mlp(i)` and `head` can each be compiled alone; calling the whole is one step over T packed tokens.
The residual stream is float32; what linear maps read is rounded to `compute_dtype` once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.attention.compressed import CompressedAttention
from jaxmoe.attention.compressor import state_shape
from jaxmoe.attention.gated_delta import GatedDeltaAttention
from jaxmoe.attention.gqa import GqaAttention
from jaxmoe.attention.mla import MlaAttention
from jaxmoe.config.model_config import CompressedConfig, MlaConfig, ModelConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.layers.embedding import Embedding
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.mlp import Mlp
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.layers.streams import Streams, StreamsHead
from jaxmoe.models.draft import DraftHead
from jaxmoe.moe.moe_block import MoeBlock, Others, Submitted
from jaxmoe.weights.param_spec import Formats

Cache = tuple[jax.Array, ...]  # the page arrays and then the state arrays of one layer


class PageArraySpec(NamedTuple):
    """One page array of a layer: `[num_pages, slots, num_heads, head_dim]` of `dtype`.

    A page's slots are those of its positions, then one for every `entry_every` positions, at least
    one, where that is not 0.
    """

    num_heads: int
    head_dim: int
    dtype: jnp.dtype
    has_positions: bool = True
    entry_every: int = 0

    def slots(self, page_size: int) -> int:
        """Of a page."""
        entries = -(-page_size // self.entry_every) if self.entry_every else 0
        return entries + (page_size if self.has_positions else 0)


def cache_spec(
    config: ModelConfig, compute_dtype: jax.typing.DTypeLike
) -> list[tuple[PageArraySpec, ...]]:
    """For every layer, the page arrays that `Decoder` expects as its cache: none where it has
    state arrays instead. The draft head's layer, where it is run, comes last.
    """
    dtype = jnp.dtype(compute_dtype)
    attention = config.attention
    if isinstance(attention, CompressedConfig):
        return [_compressed_spec(attention, i, dtype) for i in range(config.num_layers)]
    if isinstance(attention, MlaConfig):
        layer = (PageArraySpec(1, attention.kv_lora_rank + attention.rope_head_dim, dtype),)
        if (indexer := attention.indexer) is not None:
            with_keys = (*layer, PageArraySpec(1, indexer.head_dim, dtype))
            shares = indexer.sharing_layers
            return [layer if i in shares else with_keys for i in range(config.num_held_layers)]
    else:
        layer = (PageArraySpec(attention.num_kv_heads, attention.head_dim, dtype),) * 2
    return [() if i in config.linear_layers else layer for i in range(config.num_held_layers)]


def _compressed_spec(
    attention: CompressedConfig, layer: int, dtype: jnp.dtype
) -> tuple[PageArraySpec, ...]:
    ratio = attention.ratio(layer)
    keys = PageArraySpec(1, attention.head_dim, dtype, entry_every=ratio)
    if attention.kinds[layer] != "sparse":
        return (keys,)
    return keys, PageArraySpec(1, attention.index_head_dim, dtype, False, ratio)


class StateArraySpec(NamedTuple):
    """One state array of a layer: `[num_slots, *shape]` of `dtype`."""

    shape: tuple[int, ...]
    dtype: jnp.dtype


def state_spec(config: ModelConfig) -> list[tuple[StateArraySpec, ...]]:
    """For every layer, the state arrays that `Decoder` expects as its cache, behind the page
    arrays it may have.
    """
    attention = config.attention
    if isinstance(attention, CompressedConfig):
        return [_open_entries(attention, i) for i in range(config.num_layers)]
    linear = config.linear_attention
    if linear is None:
        return [()] * config.num_held_layers
    conv = StateArraySpec((linear.conv_width - 1, linear.conv_channels), jnp.dtype(jnp.float32))
    heads, key, value = linear.num_value_heads, linear.key_head_dim, linear.value_head_dim
    delta = StateArraySpec((heads, key, value), jnp.dtype(jnp.float32))
    return [
        (conv, delta) if i in config.linear_layers else () for i in range(config.num_held_layers)
    ]


def _open_entries(attention: CompressedConfig, layer: int) -> tuple[StateArraySpec, ...]:
    """Of the compressor, and of the indexer's."""
    kind = attention.kinds[layer]
    if kind == "window":
        return ()
    sizes = (attention.head_dim, attention.index_head_dim)[: 2 if kind == "sparse" else 1]
    float32 = jnp.dtype(jnp.float32)
    return tuple(StateArraySpec(state_shape(kind == "sparse", size), float32) for size in sizes)


class DecoderLayer(nnx.Module):
    """Leaves: attention_norm, attention, mlp_norm, mlp; where the model has several residual
    streams, attention_streams and mlp_streams.
    """

    def __init__(self, config: ModelConfig, layer_idx: int, formats: Formats):
        hidden, path = config.hidden_size, f"layers.{layer_idx}"
        self.attention_norm = RMSNorm(hidden, config.norm_eps, config.norm_offset)
        if config.linear_attention is not None and layer_idx in config.linear_layers:
            self.attention = GatedDeltaAttention(
                config.linear_attention, hidden, config.norm_eps, formats, f"{path}.attention"
            )
        elif isinstance(config.attention, CompressedConfig):
            self.attention = CompressedAttention(
                config.attention,
                config.rope,
                hidden,
                config.norm_eps,
                formats,
                f"{path}.attention",
                layer_idx,
            )
        elif isinstance(config.attention, MlaConfig):
            indexer = config.attention.indexer
            self.attention = MlaAttention(
                config.attention,
                config.rope,
                hidden,
                formats,
                f"{path}.attention",
                shares_choice=indexer is not None and layer_idx in indexer.sharing_layers,
            )
        else:
            self.attention = GqaAttention(
                config.attention,
                config.rope,
                hidden,
                config.norm_eps,
                formats,
                f"{path}.attention",
                config.windows[layer_idx] if config.windows else None,
                config.norm_offset,
            )
        self.mlp_norm = RMSNorm(hidden, config.norm_eps, config.norm_offset)
        if config.mlp_types[layer_idx] == "moe":
            moe_layer_idx = config.moe_layers.index(layer_idx)
            is_hashed = layer_idx in config.moe.router.hashed_layers
            hashed_vocab = config.vocab_size if is_hashed else 0
            self.mlp = MoeBlock(
                config.moe, moe_layer_idx, hidden, formats, f"{path}.mlp", hashed_vocab
            )
        else:
            self.mlp = Mlp(hidden, config.dense_intermediate, formats, f"{path}.mlp")

        def streams(name: str) -> Streams | None:
            if config.streams is None:
                return None
            return Streams(config.streams, hidden, config.norm_eps, formats, f"{path}.{name}")

        self.attention_streams = streams("attention_streams")
        self.mlp_streams = streams("mlp_streams")

    def attend(
        self, h: jax.Array, cache: Cache, step: StepInputs, ops: Ops, dtype: jnp.dtype
    ) -> tuple[jax.Array, Cache, StepInputs]:
        """The first half: float32 `h [T, D]` and the layer's cache, both updated, and the step as
        the next layer needs it. dtype: of what the linear maps read.
        """
        x, weights = _collapsed(self.attention_streams, h, ops)
        x = self.attention_norm(x, ops).astype(dtype)
        if isinstance(self.attention, MlaAttention):
            y, cache, step = self.attention(x, cache, step, ops)
        else:
            y, cache = self.attention(x, cache, step, ops)
        return _added(self.attention_streams, h, y, weights, ops), cache, step

    def feed_forward(
        self,
        h: jax.Array,
        valid: jax.Array,
        ops: Ops,
        dtype: jnp.dtype,
        token_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The second half: float32 `[T, D] -> [T, D]`; `valid [T]`: which rows are no padding;
        `token_ids [T]` where the router asks a table.
        """
        x, weights = _collapsed(self.mlp_streams, h, ops)
        x = self.mlp_norm(x, ops)
        if isinstance(self.mlp, MoeBlock):
            y = self.mlp(x, valid, ops, dtype, token_ids)
        else:
            y = self.mlp(x.astype(dtype), ops)
        return _added(self.mlp_streams, h, y, weights, ops)


Weights = tuple[jax.Array, jax.Array] | None


def _collapsed(streams: Streams | None, h: jax.Array, ops: Ops) -> tuple[jax.Array, Weights]:
    """What a block reads of the residual stream, or of several, and how they go on."""
    return (h, None) if streams is None else streams.collapse(h, ops)


def _added(
    streams: Streams | None, h: jax.Array, y: jax.Array, weights: Weights, ops: Ops
) -> jax.Array:
    if streams is None or weights is None:
        return h + y
    return streams.expand(h, y, weights, ops)


class Decoder(nnx.Module):
    """Leaves: embedding, layers.{i}, final_norm, lm_head (absent where embeddings are tied), draft
    (where it is run; its layer is then the last of `layers`); streams_head where there are several
    residual streams.

    The residual stream, here `[T, D]`, is then `[T, S, D]`.
    """

    def __init__(self, config: ModelConfig, compute_dtype: jax.typing.DTypeLike, formats: Formats):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, formats("embedding"))
        self.layers = nnx.List(
            [DecoderLayer(config, i, formats) for i in range(config.num_held_layers)]
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, formats("lm_head"))
        )
        sizes = config.hidden_size, config.norm_eps, config.norm_offset
        self.draft = DraftHead(*sizes, formats) if config.runs_draft else None

        self.streams_head = (
            None
            if config.streams is None
            else StreamsHead(
                config.streams, config.hidden_size, config.norm_eps, formats, "streams_head"
            )
        )

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """`[T]` to the residual stream, float32 `[T, D]`."""
        h = self.embedding(token_ids)
        streams = self.config.streams
        return h if streams is None else jnp.repeat(h[:, None], streams.count, axis=1)

    def attention(
        self, i: int, h: jax.Array, cache: Cache, step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, Cache, StepInputs]:
        """The first half of layer i: float32 `h [T, D]` and the layer's cache, both updated, and
        the step as the next layer needs it.
        """
        return self.layers[i].attend(h, cache, step, ops, self.compute_dtype)

    def mlp(self, i: int, h: jax.Array, step: StepInputs, ops: Ops) -> jax.Array:
        """The second half of layer i: float32 `[T, D] -> [T, D]`."""
        valid = step.token_rows >= 0
        return self.layers[i].feed_forward(h, valid, ops, self.compute_dtype, step.token_ids)

    def is_moe(self, i: int) -> bool:
        return isinstance(self.layers[i].mlp, MoeBlock)

    def mlp_submit(
        self, i: int, h: jax.Array, step: StepInputs, ops: Ops, others: Others, *, slot: int
    ) -> tuple[Submitted, Others]:
        """Starts `mlp(i)` of a MoE layer; `others` and `slot` as in `MoeBlock.submit`."""
        layer = self.layers[i]
        assert isinstance(layer.mlp, MoeBlock)
        # Of streams, how they go on is computed again after the wait: less than what a ticket
        # would have to carry.
        x, _ = _collapsed(layer.mlp_streams, h, ops)
        x = layer.mlp_norm(x, ops)
        valid, ids = step.token_rows >= 0, step.token_ids
        return layer.mlp.submit(x, valid, ops, self.compute_dtype, others, slot=slot, token_ids=ids)

    def mlp_wait(
        self, i: int, h: jax.Array, submitted: Submitted, ops: Ops, *, slot: int
    ) -> jax.Array:
        """Ends what `mlp_submit` started from `h`."""
        layer = self.layers[i]
        assert isinstance(layer.mlp, MoeBlock)
        y = layer.mlp.wait(submitted, ops, self.compute_dtype, slot=slot)
        _, weights = _collapsed(layer.mlp_streams, h, ops)
        return _added(layer.mlp_streams, h, y, weights, ops)

    def layer(
        self, i: int, h: jax.Array, cache: Cache, step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, Cache, StepInputs]:
        """All of layer i, as `attention`."""
        h, cache, step = self.attention(i, h, cache, step, ops)
        return self.mlp(i, h, step, ops), cache, step

    def head(self, h: jax.Array, ops: Ops) -> jax.Array:
        """`[*, D]` of the residual stream to float32 logits `[*, V]`."""
        if self.streams_head is not None:
            h = self.streams_head(h, ops)
        return self.logits(self.final_norm(h, ops), ops)

    def logits(self, x: jax.Array, ops: Ops) -> jax.Array:
        """`[*, D]` after a final norm to float32 logits `[*, V]`."""
        x = x.astype(self.compute_dtype)
        if self.lm_head is None:
            return ops.linear(x, self.embedding.weight, jnp.float32)
        return self.lm_head(x, ops, jnp.float32)

    def __call__(
        self, step: StepInputs, caches: Sequence[Cache], ops: Ops, logit_indices: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """One step.

        Args:
            step: the T packed tokens.
            caches: the page or state arrays of every layer, see `cache_spec` and `state_spec`.
            ops: the operations of the platform.
            logit_indices: `[R]` int32 positions in the step whose logits are wanted; padding may
                hold anything.

        Returns:
            Float32 logits `[R, V]` and the updated caches.
        """
        h, updated = self.trunk(step, caches, ops)
        return self.head(jnp.take(h, logit_indices, axis=0, mode="clip"), ops), updated

    def trunk(
        self, step: StepInputs, caches: Sequence[Cache], ops: Ops
    ) -> tuple[jax.Array, list[Cache]]:
        """A step through all layers of the model: the residual stream after the last one, float32
        `[T, D]`, and the updated caches; the draft head's is left as it is.
        """
        h = self.embed(step.token_ids)
        updated = list(caches)
        for i in range(self.config.num_layers):
            h, updated[i], step = self.layer(i, h, caches[i], step, ops)
        return h, updated

    def draft_layer(
        self, x: jax.Array, next_ids: jax.Array, cache: Cache, step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, Cache]:
        """The draft head over the tokens of a step (models/draft.py).

        Args:
            x: float32 `[T, D]`: `final_norm` of the residual stream, or what a call of this
                returned for the positions before the step's.
            next_ids: `[T]` int32: the tokens that follow those of the step.
            cache: the draft layer's pages.
            step: whose positions, rows and cache slots count; its token ids do not.

        Returns:
            Float32 `[T, D]` for `logits`, and the cache.
        """
        assert self.draft is not None
        joined = self.draft(self.embed(next_ids), x, ops, self.compute_dtype)
        h, cache, _ = self.layer(self.config.num_layers, joined, cache, step, ops)
        return self.draft.norm(h, ops), cache
