"""`DeviceOps`: the operations of `Ops` on a GPU, by the kernels of this folder.

Weights are used as they are stored. Where the routed experts run is the caller's to say: on the CPU
beside it (ffi/experts.py), or from a ring of slots (moe/experts_streamed.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.ops import Point, StepInputs, Weight
from jaxmoe.ffi.reference import kv_write
from jaxmoe.ffi.sparse import capacity
from jaxmoe.kernels import attention
from jaxmoe.kernels.grouped_matmul import (
    BLOCK,
    DECODE_TILING,
    PREFILL_TILING,
    Tiles,
    grouped_matmul,
    narrowed,
    tiles_of,
    whole,
)

Kind = Literal["prefill", "decode"]
# Parts of the context that single tokens attend at the same time, to fill the GPU. Fixed, since it
# decides the order of additions.
_NUM_SPLITS = 16
# Positions whose keys and values are expanded from their latents at a time: 335 MB for 128 heads.
_EXPANDED_ROWS = 4096
# Value dims up to this are kept in registers by `flash_attention` with 128 tokens a tile.
_FLASH_VALUES = 256


class Experts(Protocol):
    """The routed experts, with the arguments of `Ops.experts`."""

    def __call__(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array: ...


class HostExperts(Protocol):
    """The routed experts on the CPU beside the device: `NativeOps`, whose operations of these names
    exist on both platforms.
    """

    @property
    def experts(self) -> Experts: ...
    @property
    def experts_submit(self) -> Callable[..., tuple[jax.Array, ...]]: ...
    @property
    def experts_wait(self) -> Callable[..., tuple[jax.Array, ...]]: ...


class DeviceOps:
    """`Ops` on a GPU.

    experts: in the program itself, or on the CPU; None for programs without routed experts.
    kind: "prefill" or "decode": the tiles the kernels work in, fixed for a program.
    one_sequence: all tokens of a step are of one sequence, so that MLA may expand its context.
    context: positions the tokens may attend then; None: as many as a block table holds.
    interpret: run the kernels as ordinary jax, on any platform.
    """

    def __init__(
        self,
        experts: Experts | HostExperts | None,
        kind: Kind,
        *,
        one_sequence: bool = False,
        context: int | None = None,
        interpret: bool = False,
    ):
        self._host: Any = experts if hasattr(experts, "experts_submit") else None
        self._experts: Any = experts if self._host is None else self._host.experts
        self._kind: Kind = kind
        self._one_sequence = one_sequence
        self._context = context
        self.interpret = interpret
        self._tiling = DECODE_TILING if kind == "decode" else PREFILL_TILING

    def mark(self, x: jax.Array, point: Point) -> jax.Array:
        return x  # a GPU's program is not split into parts

    @property
    def expands_latents(self) -> bool:
        """Whether MLA is to hand over latents, as prompts want it (`attend_latents`)."""
        return self._one_sequence

    @property
    def splits_experts(self) -> bool:
        """Whether the CPU computes experts while the device goes on."""
        return self._host is not None

    def experts_submit(self, *args: Any, **options: Any) -> tuple[jax.Array, ...]:
        return self._host.experts_submit(*args, **options)

    def experts_wait(self, *args: Any, **options: Any) -> tuple[jax.Array, ...]:
        return self._host.experts_wait(*args, **options)

    def map_rows(self, f: Callable[[Any], Any], x: Any) -> Any:
        return jax.vmap(f)(x)

    def linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        return self._product(x, w.data[None], w.scale_inv, out_dtype)

    def head_linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        num_tokens, num_heads, k = x.shape
        rows = jnp.swapaxes(x, 0, 1).reshape(num_heads * num_tokens, k)
        tiling = narrowed(self._tiling, x.dtype)
        starts = jnp.arange(num_heads, dtype=jnp.int32) * num_tokens
        tiles = tiles_of(starts, starts + num_tokens, rows.shape[0], tiling.rows)
        y = grouped_matmul(
            rows,
            (w.data,),
            None if w.scale_inv is None else (w.scale_inv,),
            tiles,
            out_dtype=out_dtype or x.dtype,
            tiling=tiling,
            interpret=self.interpret,
        )
        return jnp.swapaxes(y.reshape(num_heads, num_tokens, -1), 0, 1)

    def _product(self, x, data, scale, out_dtype):
        if x.dtype == jnp.float32 and data.dtype != jnp.float32:
            return self._product_of_parts(x, data, scale, out_dtype or x.dtype)
        tiling = narrowed(self._tiling, x.dtype)
        return grouped_matmul(
            x,
            (data,),
            None if scale is None else (scale[None],),
            whole(x.shape[0], tiling.rows),
            out_dtype=out_dtype or x.dtype,
            tiling=tiling,
            interpret=self.interpret,
        )

    def _product_of_parts(self, x, data, scale, out_dtype):
        """Float32 rows with weights that BF16 holds exactly: three products on tensor cores, of the
        parts of x (8 bits of its 24 each), instead of one of float32 without them.
        """
        parts = []
        rest = x
        for _ in range(3):
            # Not a cast back and forth, which XLA may take for nothing.
            part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
            parts.append(part.astype(jnp.bfloat16))
            rest = rest - part
        y = self._product(jnp.concatenate(parts), data, scale, jnp.float32)
        high, middle, low = y.reshape(3, x.shape[0], -1)
        return (high + (middle + low)).astype(out_dtype)

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
        if self._experts is None:
            raise ValueError("these operations were made without routed experts")
        return self._experts(
            x, expert_ids, combine_weights, moe_layer_idx, activation=activation, biases=biases
        )

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
        assert selected is None and num_selected is None, "no kernel attends selected positions"
        new = (k_new,) if v_new is None else (k_new, v_new)
        cache = tuple(
            kv_write(pages, values, step.kv_slots) for pages, values in zip(cache, new, strict=True)
        )
        page_size, num_heads = cache[0].shape[1], q.shape[1]
        flat = [pages.reshape(-1, *pages.shape[2:]) for pages in cache]
        keys = attention.sources(flat[0], num_heads)
        values = attention.sources(flat[-1], num_heads, v_dim)
        if self._kind == "prefill" and v_dim <= _FLASH_VALUES:
            out, lse = attention.flash_attention(
                q,
                keys,
                values,
                _row_tiles(step),
                step.positions,
                step.block_tables,
                page_size=page_size,
                scale=scale,
                window=window,
                interpret=self.interpret,
            )
            out, lse = out[None], lse[None]
        else:
            out, lse = attention.paged_decode(
                q,
                keys,
                values,
                step.token_rows,
                step.positions,
                step.block_tables,
                page_size=page_size,
                num_splits=_NUM_SPLITS,
                scale=scale,
                window=window,
                interpret=self.interpret,
            )
        merged = attention.merge(out, lse, sinks)
        return jnp.where(step.token_rows[:, None, None] < 0, 0.0, merged), cache

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
        """Keeps the keys; None: every position, since a context never holds more than `top_k`."""
        page_size = pages.shape[1]
        if capacity(step, page_size) >= top_k + page_size:
            raise NotImplementedError(f"contexts beyond {top_k} positions have no GPU kernel yet")
        return None, kv_write(pages, k_new, step.kv_slots)

    def attend_latents(
        self,
        q: jax.Array,
        k_new: jax.Array,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        *,
        w_uk: Weight,
        w_uv: Weight,
        scale: float,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """MLA of one sequence's prompt with keys and values expanded from their latents.

        q: `[T, N, nope + rope]`. k_new: `[T, 1, C + rope]`. w_uk: `[N, C, nope]`, w_uv `[N, v, C]`.
        Returns float32 `[T, N, v]` and the cache. Needs 3.4 times fewer products than attending
        latents (DeepSeek-V3's dims), which counts where products bind: in prompts.
        """
        cache = (kv_write(cache[0], k_new, step.kv_slots),)
        num_pages, page_size, _, width = cache[0].shape
        flat = cache[0].reshape(num_pages * page_size, width)
        table = step.block_tables[0]
        context = self._context or table.shape[0] * page_size

        def latents(begin: int, size: int) -> jax.Array:
            at = begin + jnp.arange(size)
            page = jnp.maximum(table[jnp.minimum(at // page_size, table.shape[0] - 1)], 0)
            return flat[page * page_size + at % page_size]

        out, _ = self.attend_expanded(
            q,
            latents,
            context,
            _row_tiles(step),
            step.positions,
            context,
            w_uk=w_uk,
            w_uv=w_uv,
            scale=scale,
        )
        return jnp.where(step.token_rows[:, None, None] < 0, 0.0, out), cache

    def attend_expanded(
        self,
        q: jax.Array,
        latents: Callable[[int, int], jax.Array],
        num_rows: int,
        tiles: Tiles,
        positions: jax.Array,
        count: jax.Array | int,
        *,
        w_uk: Weight,
        w_uv: Weight,
        scale: float,
    ) -> tuple[jax.Array, jax.Array]:
        """Attention over the first `count` of `num_rows` latents, some thousand expanded at a time.

        latents: `[size, C + rope]` from a row on. positions: of the queries, counted from the first
        latent. Returns float32 `[T, N, v]` and the log of each softmax's denominator `[T, N]`.
        """
        latent_dim, nope = w_uk.data.shape[1:]
        num_heads = q.shape[1]
        maps = _latent_to_keys(w_uk), _flat_heads(w_uv)
        out = lse = None
        for begin in range(0, num_rows, _EXPANDED_ROWS):
            size = min(_EXPANDED_ROWS, num_rows - begin)
            rows = latents(begin, size)  # [S, C + rope]
            if out is not None:
                # Else XLA expands all of the context at once.
                rows, out, lse = jax.lax.optimization_barrier((rows, out, lse))
            latent, k_rope = rows[:, :latent_dim], rows[:, latent_dim:]
            k_nope, value = (self._expand(latent, m, num_heads, rows.dtype) for m in maps)
            part = attention.flash_attention(
                q,
                [
                    *attention.sources(k_nope[..., :nope], num_heads),
                    *attention.sources(k_rope[:, None], num_heads),
                ],
                attention.sources(value, num_heads, w_uv.data.shape[1]),
                tiles,
                positions,
                None,
                span=jnp.stack([jnp.int32(begin), jnp.minimum(count, begin + size)]),
                scale=scale,
                interpret=self.interpret,
            )
            if out is None or lse is None:
                out, lse = part
            else:
                both = jnp.stack([lse, part[1]])
                total = jnp.logaddexp(lse, part[1])
                share = jnp.exp(both - total)[..., None]
                out = out * share[0] + jnp.where(share[1] > 0, part[0], 0.0) * share[1]
                lse = total
        assert out is not None and lse is not None
        return out, lse

    def gated_delta(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError("recurrent states have no GPU kernel yet")

    def _expand(self, latent, m: Weight, num_heads: int, dtype) -> jax.Array:
        y = self._product(latent, m.data[None], m.scale_inv, dtype)
        return y.reshape(latent.shape[0], num_heads, -1)


def _row_tiles(step: StepInputs):
    """Tiles of query tokens: those of a row lie together."""
    num_rows = step.block_tables.shape[0]
    rows = jnp.where(step.token_rows < 0, num_rows, step.token_rows)
    counts = jnp.bincount(rows, length=num_rows + 1)[:num_rows].astype(jnp.int32)
    ends = jnp.cumsum(counts)
    return tiles_of(ends - counts, ends, rows.shape[0], attention.QUERY_ROWS)


def _flat_heads(w: Weight) -> Weight:
    """Per-head maps `[N, n, K]` as one `[N * n', K]`, n' a multiple of a scale block's rows."""
    num_heads, n, k = w.data.shape
    if w.scale_inv is None:
        return Weight(w.data.reshape(num_heads * n, k))
    spare = -n % BLOCK
    data = jnp.pad(w.data, ((0, 0), (0, spare), (0, 0))) if spare else w.data
    return Weight(data.reshape(-1, k), w.scale_inv.reshape(-1, w.scale_inv.shape[-1]))


def _latent_to_keys(w_uk: Weight) -> Weight:
    """`[N, C, nope]`, which takes queries to latents, turned round: latents to keys."""
    scale = None if w_uk.scale_inv is None else jnp.swapaxes(w_uk.scale_inv, 1, 2)
    return _flat_heads(Weight(jnp.swapaxes(w_uk.data, 1, 2), scale))
