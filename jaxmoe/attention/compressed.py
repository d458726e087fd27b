"""Attention to a window and to compressed entries (DeepSeek-V4).

A layer's page array holds, behind the `Z` positions of a page, the entries whose last position is
in that page: one slot every `ratio` positions, at least one. A token attends a list of flat slots
of it, the window's and then the entries', as sparse attention does (ffi/sparse.py), so pages,
prefix cache and preemption serve them unseen; what is open of an entry is recurrent state
(compressor.py). The indexer of "sparse" layers chooses among keys of entries, which have pages of
`Z / 4` slots: to `Ops.select` they are positions of a shorter text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.attention.compressor import Compressor
from jaxmoe.config.model_config import CompressedConfig, RopeConfig
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.ffi.sparse import capacity
from jaxmoe.layers import rope
from jaxmoe.layers.linear import HeadLinear, Linear
from jaxmoe.layers.norm import RMSNorm, rms_normalized
from jaxmoe.weights.param_spec import Formats, ParamSpec, new_param

Cache = tuple[jax.Array, ...]


class EntryIndexer(nnx.Module):
    """Leaves: q `[N * H, R]` of the query's latent, head_weights `[N, D]`, compressor."""

    def __init__(
        self, config: CompressedConfig, hidden: int, norm_eps: float, formats: Formats, path: str
    ):
        c = config
        self.config = config
        self.q = Linear(c.q_lora_rank, c.index_heads * c.index_head_dim, formats(f"{path}.q"))
        self.head_weights = Linear(hidden, c.index_heads, formats(f"{path}.head_weights"))
        self.compressor = Compressor(
            4,
            True,
            c.index_head_dim,
            c.compressed_rope,
            hidden,
            norm_eps,
            formats,
            f"{path}.compressor",
        )

    def __call__(
        self,
        x: jax.Array,
        q_latent: jax.Array,
        pages: jax.Array,
        state: jax.Array,
        of_entries: StepInputs,
        step: StepInputs,
        ops: Ops,
    ) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        """What `Ops.select` says of entries, of which `of_entries` is the step, the keys' pages and
        the state.
        """
        c, num_tokens = self.config, x.shape[0]
        q = self.q(q_latent, ops, jnp.float32).reshape(num_tokens, c.index_heads, -1)
        key, state = self.compressor(x, state, step, ops)
        scale = (c.index_heads * c.index_head_dim) ** -0.5
        selected, pages = ops.select(
            rope.apply(q, step.positions, c.compressed_rope, ops).astype(x.dtype),
            self.head_weights(x, ops, jnp.float32) * scale,
            key.astype(x.dtype),
            pages,
            of_entries,
            top_k=c.index_top_k,
        )
        return selected, pages, state


class CompressedAttention(nnx.Module):
    """Leaves: q_a, q_a_norm, q_b, kv, kv_norm, sinks `[N]`, o_a `[G, O, N H / G]`, o_b; compressor
    and indexer, where the layer has them.
    """

    def __init__(
        self,
        config: CompressedConfig,
        rope_config: RopeConfig,
        hidden: int,
        norm_eps: float,
        formats: Formats,
        path: str,
        layer: int,
    ):
        c = config
        self.config, self.norm_eps = config, norm_eps
        self.ratio = c.ratio(layer)
        self.rope_config = c.compressed_rope if self.ratio else rope_config
        self.q_a = Linear(hidden, c.q_lora_rank, formats(f"{path}.q_a"))
        self.q_a_norm = RMSNorm(c.q_lora_rank, norm_eps)
        self.q_b = Linear(c.q_lora_rank, c.num_heads * c.head_dim, formats(f"{path}.q_b"))
        self.kv = Linear(hidden, c.head_dim, formats(f"{path}.kv"))
        self.kv_norm = RMSNorm(c.head_dim, norm_eps)
        self.sinks = new_param(ParamSpec((c.num_heads,), "float32", "bias")) if c.sinks else None
        group_row = c.num_heads * c.head_dim // c.o_groups
        self.o_a = HeadLinear(c.o_groups, group_row, c.o_rank, formats(f"{path}.o_a"))
        self.o_b = Linear(c.o_groups * c.o_rank, hidden, formats(f"{path}.o_b"))
        if self.ratio:
            self.compressor = Compressor(
                self.ratio,
                c.kinds[layer] == "sparse",
                c.head_dim,
                self.rope_config,
                hidden,
                norm_eps,
                formats,
                f"{path}.compressor",
            )
        self.indexer = (
            EntryIndexer(c, hidden, norm_eps, formats, f"{path}.indexer")
            if c.kinds[layer] == "sparse"
            else None
        )

    def __call__(
        self, x: jax.Array, cache: Cache, step: StepInputs, ops: Ops
    ) -> tuple[jax.Array, Cache]:
        """`x [T, D]` to float32 `[T, D]` and the cache, updated: pages, the indexer's pages, the
        compressor's state, the indexer's; those the layer has.
        """
        c, num_tokens = self.config, x.shape[0]
        q_latent = self.q_a_norm(self.q_a(x, ops, jnp.float32), ops).astype(x.dtype)
        q = self.q_b(q_latent, ops, jnp.float32).reshape(num_tokens, c.num_heads, -1)
        q = rms_normalized(q, self.norm_eps, ops)
        kv = self.kv_norm(self.kv(x, ops, jnp.float32), ops)[:, None]
        q, kv = (
            rope.apply(a, step.positions, self.rope_config, ops).astype(x.dtype) for a in (q, kv)
        )
        attended, cache = self._attend(x, q, kv, q_latent, cache, step, ops)
        attended = rope.undo(attended, step.positions, self.rope_config, ops).astype(x.dtype)
        groups = self.o_a(attended.reshape(num_tokens, c.o_groups, -1), ops)
        return self.o_b(groups.reshape(num_tokens, -1), ops, jnp.float32), cache

    def _attend(
        self,
        x: jax.Array,
        q: jax.Array,
        kv: jax.Array,
        q_latent: jax.Array,
        cache: Cache,
        step: StepInputs,
        ops: Ops,
    ) -> tuple[jax.Array, Cache]:
        c = self.config
        sinks = None if self.sinks is None else self.sinks[...]
        options: dict[str, Any] = dict(scale=c.softmax_scale, v_dim=c.head_dim, sinks=sinks)
        if not self.ratio:
            return ops.attend(q, kv, None, cache, step, window=c.window, **options)
        pages, *rest = cache
        places = Places(pages, self.ratio, step)
        index_pages = rest.pop(0) if self.indexer is not None else None
        entry, state = self.compressor(x, rest[0], step, ops)
        states = [state]
        selected = None
        kept: tuple[jax.Array, ...] = ()
        if self.indexer is not None and index_pages is not None:
            selected, index_pages, index_state = self.indexer(
                x, q_latent, index_pages, rest[1], places.of_entries(index_pages), step, ops
            )
            states.append(index_state)
            kept = (index_pages,)
        slots, count = places.listed(c.window, selected, c.index_top_k)
        both = dataclasses.replace(
            step, kv_slots=jnp.concatenate([places.of_positions(), places.of_new_entries()])
        )
        attended, (pages,) = ops.attend(
            q,
            jnp.concatenate([kv, entry.astype(x.dtype)]),
            None,
            (pages,),
            both,
            selected=slots,
            num_selected=count,
            **options,
        )
        return attended, (pages, *kept, *states)


class Places:
    """Where a step's positions and entries are in a layer's pages `[P, Z + ceil(Z / ratio), 1, H]`.

    All results are int32.
    """

    def __init__(self, pages: jax.Array, ratio: int, step: StepInputs) -> None:
        self._step, self._ratio = step, ratio
        self._slots = pages.shape[1]
        self._per_page = -(-self._slots // (ratio + 1))  # entries
        self._page_size = self._slots - self._per_page
        self._row = jnp.maximum(step.token_rows, 0)
        at = jnp.maximum(step.positions, 0)
        self._at = at
        self._num_entries = (at + 1) // ratio  # that a token sees

    def of_positions(self) -> jax.Array:
        """`[T]` slots that the step's positions are written to; -1: nowhere."""
        own, size = self._step.kv_slots, self._page_size
        return jnp.where(own < 0, -1, own // size * self._slots + own % size)

    def of_new_entries(self) -> jax.Array:
        """`[T]` slots of the entries that the step's tokens end; -1: it ends none."""
        own, size = self._step.kv_slots, self._page_size
        slot = own // size * self._slots + size + own % size // self._ratio
        return jnp.where(self._ends_entry(), slot, -1)

    def of_entries(self, index_pages: jax.Array) -> StepInputs:
        """The step of the entries' keys, each a position of pages of `Z / ratio`."""
        own, size, per_page = self._step.kv_slots, self._page_size, self._per_page
        assert index_pages.shape[1] == per_page and per_page * self._ratio == size
        slot = own // size * per_page + own % size // self._ratio
        return dataclasses.replace(
            self._step,
            positions=jnp.maximum(self._num_entries - 1, 0),
            token_rows=jnp.where(self._num_entries > 0, self._step.token_rows, -1),
            kv_slots=jnp.where(self._ends_entry(), slot, -1),
        )

    def listed(
        self, window: int, selected: jax.Array | None, top_k: int
    ) -> tuple[jax.Array, jax.Array]:
        """`[T, L]` slots that tokens attend, the window's first, and how many of them, `[T]`.

        selected: of the entries, as `Ops.select` says; None: all.
        """
        held = capacity(self._step, self._page_size)
        in_window = jnp.minimum(self._at + 1, window)
        begin = self._at + 1 - in_window
        positions = begin[:, None] + jnp.arange(min(window, held), dtype=jnp.int32)
        near = self._slot(positions, positions % self._page_size)
        if selected is None:
            seen = self._num_entries
            entries = jnp.arange(max(held // self._ratio, 1), dtype=jnp.int32)
            last = jnp.broadcast_to((entries + 1) * self._ratio - 1, (len(self._at), len(entries)))
            offset = self._page_size + last % self._page_size // self._ratio
            far = self._slot(last, offset)
        else:
            seen = jnp.minimum(self._num_entries, top_k)
            per_page, size = self._per_page, self._page_size
            far = selected // per_page * self._slots + size + selected % per_page
        # One after the other without a gap.
        wide = near.shape[1]
        j = jnp.arange(wide + far.shape[1], dtype=jnp.int32)
        behind = jnp.clip(j - in_window[:, None], 0, far.shape[1] - 1)
        listed = jnp.where(
            j < in_window[:, None],
            jnp.take_along_axis(near, jnp.minimum(j, wide - 1)[None].repeat(len(near), 0), axis=1),
            jnp.take_along_axis(far, behind, axis=1),
        )
        count = in_window + seen
        return jnp.where(j < count[:, None], listed, -1).astype(jnp.int32), count

    def _ends_entry(self) -> jax.Array:
        return (self._step.kv_slots >= 0) & (self._at % self._ratio == self._ratio - 1)

    def _slot(self, positions: jax.Array, offsets: jax.Array) -> jax.Array:
        """`[T, n]` of a token's own row."""
        tables = self._step.block_tables[self._row]  # [T, MP]
        page = jnp.minimum(positions // self._page_size, tables.shape[1] - 1)
        return jnp.take_along_axis(tables, page, axis=1) * self._slots + offsets
