"""The operations of `Ops` in plain jnp: oracle of every kernel, and what training runs on.

`ReferenceOps` is the definition the native operations are tested against: weights dequantized
exactly, all arithmetic in FP32, nothing fast. `BatchedSequenceOps` is the form for training: the
same maps, but attention over a batch of whole sequences without a cache, and experts computed in
blocks of equal expert, so the cost is that of the activated experts. Everything is differentiable
in activations and in float weights.

Not here: tiling, paging tricks, or any choice of kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import ClampedSwiglu, GatedDeltaConfig
from jaxmoe.ffi.ops import GatedDeltaWeights, Point, StepInputs, Weight
from jaxmoe.ffi.reference_delta import gated_delta
from jaxmoe.ffi.sparse import as_pages_of_one, capacity
from jaxmoe.quant.formats import FORMATS, ZERO_MASK, WeightFormat

_HIGHEST = jax.lax.Precision.HIGHEST
# Rows of one block of equal expert in `BatchedSequenceOps`: each block gathers one copy of its
# expert's weights, so large enough that the copies stay small beside the products, small enough
# that half-empty blocks do not matter.
_TOKEN_BLOCK = 64
_FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_INT4_VALUES = np.arange(-8, 8).astype(np.float32)
# Of the sixteen codes.
_NIBBLE_VALUES: Mapping[WeightFormat, np.ndarray] = {
    "int4_g32": _INT4_VALUES,
    "int4_g128": _INT4_VALUES,
    "mxfp4": np.concatenate([_FP4_VALUES, -_FP4_VALUES]),
    "uint4_g32": np.arange(16).astype(np.float32),
    "uint4_g128": np.arange(16).astype(np.float32),
    "nvfp4": np.concatenate([_FP4_VALUES, -_FP4_VALUES]),
}


def dequantize(weight: Weight) -> jax.Array:
    """The exact FP32 value of stored weights: `[..., N, K]`, leading axes as stored."""
    info = FORMATS[weight.format]
    if info.bits == 4:
        data = jnp.asarray(_NIBBLE_VALUES[weight.format])[_nibbles(weight.data)]
    else:
        data = weight.data.astype(jnp.float32)
    if weight.scale_inv is None:
        return data
    n, k = data.shape[-2:]
    scale = weight.scale_inv
    if info.scale_dtype == "uint32":
        zero = (scale & ZERO_MASK).astype(jnp.float32)
        data = data - jnp.repeat(zero, info.group_cols, axis=-1)
        scale = jax.lax.bitcast_convert_type(scale & ~np.uint32(ZERO_MASK), jnp.float32)
    if info.tail_cols:
        factor = jax.lax.bitcast_convert_type(scale[..., -info.tail_cols :], jnp.float32)
        codes = jax.lax.bitcast_convert_type(scale[..., : -info.tail_cols], jnp.float8_e4m3fn)
        scales = jnp.repeat(codes.astype(jnp.float32), info.group_cols, axis=-1)
        return data * scales * factor[..., None]
    scale = _powers_of_two(scale) if info.scale_dtype == "uint8" else scale.astype(jnp.float32)
    scale = jnp.repeat(scale, info.group_rows, axis=-2)[..., :n, :]
    scale = jnp.repeat(scale, info.group_cols or k, axis=-1)[..., :k]
    return data * scale


def _nibbles(data: jax.Array) -> jax.Array:
    """uint8 `[..., K/2]` to the K halves, low one first."""
    halves = jnp.stack([data & 15, data >> 4], axis=-1)
    return halves.reshape(*data.shape[:-1], 2 * data.shape[-1])


def _powers_of_two(codes: jax.Array) -> jax.Array:
    """2^(code - 127), subnormal for code 0; NaN for 255."""
    bits = codes.astype(jnp.uint32) << 23
    bits = jnp.where(codes == 0, 1 << 22, bits)
    bits = jnp.where(codes == 255, 0x7FC00000, bits).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def activate(gate: jax.Array, up: jax.Array, activation: ClampedSwiglu | None) -> jax.Array:
    """What an expert does between its products; `activation` None is silu(gate) * up."""
    if activation is None:
        return jax.nn.silu(gate) * up
    gate = jnp.minimum(gate, activation.limit)
    up = jnp.clip(up, -activation.limit, activation.limit)
    return (up + activation.up_offset) * gate * jax.nn.sigmoid(activation.alpha * gate)


class ReferenceOps:
    """`Ops` in jnp.

    experts: one mapping per MoE layer with `gate`, `up` (`[E, F, D]`) and `down` (`[E, D, F]`)
    Weights; empty for a model without routed experts.
    """

    def __init__(self, experts: Sequence[Mapping[str, Weight]] = ()):
        self._experts = experts

    expands_latents = False

    def attend_latents(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the reference attends latents as they are")

    @property
    def splits_experts(self) -> bool:
        return False  # one after the other all the same

    def mark(self, x: jax.Array, point: Point) -> jax.Array:
        return x

    def map_rows(self, f: Callable[[Any], Any], x: Any) -> Any:
        return jax.vmap(f)(x)

    def linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        y = jnp.einsum("tk,nk->tn", x.astype(jnp.float32), dequantize(w), precision=_HIGHEST)
        return y.astype(out_dtype or x.dtype)

    def head_linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        y = jnp.einsum("tgk,gnk->tgn", x.astype(jnp.float32), dequantize(w), precision=_HIGHEST)
        return y.astype(out_dtype or x.dtype)

    def experts(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        layer = self._experts[moe_layer_idx]
        x = x.astype(jnp.float32)
        num_experts = layer["gate"].data.shape[0]

        def add_expert(e: jax.Array, y: jax.Array) -> jax.Array:
            def matrix(which: str) -> jax.Array:
                w = layer[which]
                scale = None if w.scale_inv is None else w.scale_inv[e]
                return dequantize(Weight(w.data[e], scale))

            gate = jnp.einsum("td,fd->tf", x, matrix("gate"), precision=_HIGHEST)
            up = jnp.einsum("td,fd->tf", x, matrix("up"), precision=_HIGHEST)
            if biases is not None:
                gate, up = gate + biases[0][e], up + biases[1][e]
            hidden = activate(gate, up, activation)
            out = jnp.einsum("tf,df->td", hidden, matrix("down"), precision=_HIGHEST)
            chosen = expert_ids == e  # [T, A]
            share = jnp.where(chosen, combine_weights.astype(jnp.float32), 0.0).sum(-1)  # [T]
            # A token that did not choose the expert must not see its NaNs either.
            return y + jnp.where(chosen.any(-1)[:, None], share[:, None] * out, 0.0)

        return jax.lax.fori_loop(0, num_experts, add_expert, jnp.zeros_like(x))

    def experts_submit(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *others: jax.Array,
        slot: int = 0,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """The ticket is the result."""
        y = self.experts(
            x, expert_ids, combine_weights, moe_layer_idx, activation=activation, biases=biases
        )
        return y, *others

    def experts_wait(
        self, ticket: jax.Array, num_tokens: int, hidden: int, *others: jax.Array, slot: int = 0
    ) -> tuple[jax.Array, ...]:
        assert ticket.shape == (num_tokens, hidden)
        return ticket, *others

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        *,
        scale: float,
        v_dim: int,
        window: int | None = None,
        sinks: jax.Array | None = None,
        selected: jax.Array | None = None,
        num_selected: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        new = (k_new,) if v_new is None else (k_new, v_new)
        cache = tuple(
            kv_write(pages, values, step.kv_slots) for pages, values in zip(cache, new, strict=True)
        )
        seen = cache
        if selected is not None:
            seen, step = as_pages_of_one(cache, step, selected, num_selected)
        out = paged_attention(
            q,
            seen,
            step.token_rows,
            step.positions,
            step.block_tables,
            scale=scale,
            v_dim=v_dim,
            window=window,
            sinks=sinks,
        )
        return out, cache

    def select(
        self,
        q: jax.Array,
        head_weights: jax.Array,
        k_new: jax.Array,
        pages: jax.Array,
        step: StepInputs,
        *,
        top_k: int,
    ) -> tuple[jax.Array | None, jax.Array]:
        pages = kv_write(pages, k_new, step.kv_slots)
        if capacity(step, pages.shape[1]) <= top_k:
            return None, pages
        return index_select(q, head_weights, pages, step, top_k=top_k), pages

    def gated_delta(
        self,
        qkv: jax.Array,
        decay_input: jax.Array,
        rate_input: jax.Array,
        weights: GatedDeltaWeights,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        config: GatedDeltaConfig,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return gated_delta(qkv, decay_input, rate_input, weights, cache, step, config)


def kv_write(pages: jax.Array, new: jax.Array, kv_slots: jax.Array) -> jax.Array:
    """Pages `[P, Z, K, H]` with `new [T, K, H]` at the flat slots `kv_slots [T]`; -1: nowhere."""
    num_slots = pages.shape[0] * pages.shape[1]
    flat = pages.reshape(num_slots, *pages.shape[2:])
    slots = jnp.where(kv_slots < 0, num_slots, kv_slots)
    return flat.at[slots].set(new.astype(pages.dtype), mode="drop").reshape(pages.shape)


def paged_attention(
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    token_rows: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
    *,
    scale: float,
    v_dim: int,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """f32 `[T, N, v_dim]`: tokens of `q [T, N, H]` attend positions 0..their own of their row, or
    the last `window` of those; `sinks [N]` take part in the softmax without a value.
    """
    k_pages = cache[0]
    _, page_size, num_kv_heads, _ = k_pages.shape
    num_heads = q.shape[1]
    grouped = q.reshape(q.shape[0], num_kv_heads, num_heads // num_kv_heads, q.shape[2])

    def one_token(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_t, row, position = args
        pages = jnp.maximum(block_tables[jnp.maximum(row, 0)], 0)  # [MP]
        keys = k_pages[pages].astype(jnp.float32)
        keys = keys.reshape(-1, *keys.shape[2:])  # [S, K, H]
        if len(cache) == 1:
            values = keys[..., :v_dim]
        else:
            values = cache[1][pages].astype(jnp.float32)
            values = values.reshape(-1, *values.shape[2:])  # [S, K, Hv]
        scores = jnp.einsum("kgh,skh->kgs", q_t.astype(jnp.float32), keys, precision=_HIGHEST)
        at = jnp.arange(pages.shape[0] * page_size)
        visible = at <= position
        if window is not None:
            visible &= at > position - window
        scores = jnp.where(visible, scores * scale, -jnp.inf)
        weights = _softmax(scores, None if sinks is None else sinks.reshape(scores.shape[:2]))
        values = jnp.where(visible[:, None, None], values, 0.0)
        out = jnp.einsum("kgs,skv->kgv", weights, values, precision=_HIGHEST)
        return jnp.where(row < 0, 0.0, out.reshape(num_heads, v_dim))

    return jax.lax.map(one_token, (grouped, token_rows, jnp.maximum(positions, 0)))


def index_select(
    q: jax.Array, head_weights: jax.Array, pages: jax.Array, step: StepInputs, *, top_k: int
) -> jax.Array:
    """int32 `[T, top_k]`, as `Ops.select` returns it; a row has more than `top_k` positions."""
    page_size = pages.shape[1]

    def one_token(args: tuple[jax.Array, ...]) -> jax.Array:
        q_t, weights, row, position = args
        table = step.block_tables[jnp.maximum(row, 0)]  # [MP]
        keys = pages[jnp.maximum(table, 0)].astype(jnp.float32).reshape(-1, q_t.shape[-1])
        products = jnp.einsum("nh,sh->ns", q_t.astype(jnp.float32), keys, precision=_HIGHEST)
        scores = jnp.einsum("n,ns->s", weights, jax.nn.relu(products), precision=_HIGHEST)
        at = jnp.arange(keys.shape[0], dtype=jnp.int32)
        _, chosen = jax.lax.top_k(jnp.where(at <= position, scores, -jnp.inf), top_k)
        chosen = jnp.sort(chosen.astype(jnp.int32))
        is_seen = (row >= 0) & (jnp.arange(top_k) <= position)
        chosen = jnp.where(position < top_k, jnp.arange(top_k, dtype=jnp.int32), chosen)
        slots = table[chosen // page_size] * page_size + chosen % page_size
        return jnp.where(is_seen, slots, -1)

    return jax.lax.map(one_token, (q, head_weights, step.token_rows, step.positions))


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Over the last axis `[..., S]`; `sinks [...]` count in the sum and get no weight."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    return jax.nn.softmax(jnp.concatenate([scores, sinks[..., None]], axis=-1), axis=-1)[..., :-1]


class BatchedSequenceOps(ReferenceOps):
    """`Ops` for training: T = num_sequences * S packed tokens, whole sequences one after another.

    `attend` takes an empty cache, ignores `step`, and is causal within each sequence.
    """

    def __init__(self, experts: Sequence[Mapping[str, Weight]], num_sequences: int):
        super().__init__(experts)
        self._num_sequences = num_sequences

    def experts(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        layer = self._experts[moe_layer_idx]
        gate, up, down = (dequantize(layer[which]) for which in ("gate", "up", "down"))
        num_experts = gate.shape[0]
        num_tokens, per_token = expert_ids.shape
        num_pairs = num_tokens * per_token
        x = x.astype(jnp.float32)

        # Give every pair (token, expert) a place in blocks of equal expert.
        pair_expert = jnp.where(expert_ids < 0, num_experts, expert_ids).reshape(-1)
        counts = jnp.bincount(pair_expert, length=num_experts + 1)
        blocks = (counts + _TOKEN_BLOCK - 1) // _TOKEN_BLOCK
        first_block = jnp.cumsum(blocks) - blocks
        order = jnp.argsort(pair_expert, stable=True)
        first_pair = jnp.cumsum(counts) - counts
        sorted_expert = pair_expert[order]
        rank = jnp.arange(num_pairs) - first_pair[sorted_expert]
        place = first_block[sorted_expert] * _TOKEN_BLOCK + rank
        num_blocks = num_pairs // _TOKEN_BLOCK + num_experts + 1
        token_at = jnp.full(num_blocks * _TOKEN_BLOCK, num_tokens).at[place].set(order // per_token)
        place_of_pair = jnp.zeros(num_pairs, place.dtype).at[order].set(place)
        block_expert = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
        block_expert = jnp.minimum(block_expert, num_experts - 1)

        x_padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        x_blocks = x_padded[token_at].reshape(num_blocks, _TOKEN_BLOCK, -1)
        gates = jnp.einsum("bmd,bfd->bmf", x_blocks, gate[block_expert])
        ups = jnp.einsum("bmd,bfd->bmf", x_blocks, up[block_expert])
        if biases is not None:
            gates += biases[0][block_expert][:, None, :]
            ups += biases[1][block_expert][:, None, :]
        h = activate(gates, ups, activation)
        y_blocks = jnp.einsum("bmf,bdf->bmd", h, down[block_expert])
        y_pairs = y_blocks.reshape(num_blocks * _TOKEN_BLOCK, -1)[place_of_pair]
        share = jnp.where(expert_ids < 0, 0.0, combine_weights.astype(jnp.float32))
        return jnp.einsum("ta,tad->td", share, y_pairs.reshape(num_tokens, per_token, -1))

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: tuple[jax.Array, ...],
        step: StepInputs | None,
        *,
        scale: float,
        v_dim: int,
        window: int | None = None,
        sinks: jax.Array | None = None,
        selected: jax.Array | None = None,
        num_selected: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        assert selected is None and num_selected is None, "sparse attention is not trained"
        if cache:
            raise ValueError(
                f"training attends whole sequences: cache must be (), got {len(cache)}"
            )
        num_tokens, num_heads, head_dim = q.shape
        if num_tokens % self._num_sequences:
            raise ValueError(
                f"{num_tokens} tokens are not {self._num_sequences} sequences of one length"
            )
        length = num_tokens // self._num_sequences
        num_kv_heads = k_new.shape[1]
        values = k_new[..., :v_dim] if v_new is None else v_new
        q, k, v = (
            a.astype(jnp.float32).reshape(self._num_sequences, length, *a.shape[1:])
            for a in (q, k_new, values)
        )
        q = q.reshape(*q.shape[:2], num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = jnp.einsum("bqkgh,bskh->bkgqs", q, k) * scale
        causal = jnp.tril(jnp.ones((length, length), bool))
        if window is not None:
            causal &= ~jnp.tril(jnp.ones((length, length), bool), -window)
        by_head = None if sinks is None else sinks.reshape(scores.shape[1:3])[None, :, :, None]
        if by_head is not None:
            by_head = jnp.broadcast_to(by_head, scores.shape[:-1])
        weights = _softmax(jnp.where(causal, scores, -jnp.inf), by_head)
        out = jnp.einsum("bkgqs,bskv->bqkgv", weights, v)
        return out.reshape(num_tokens, num_heads, v_dim), cache
