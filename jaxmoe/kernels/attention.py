"""Attention over a paged or contiguous KV cache on a GPU, in two kernels.

`flash_attention` (arXiv 2205.14135) takes tiles of query tokens of one head: for prompts.
`paged_decode` takes the query heads that share keys as its tile and splits the context: for single
tokens. Both walk the context in blocks whose borders are absolute positions, so a token's result
does not depend on what else is in the step, nor on how prompts were cut into chunks.

Head dims are cut into parts that are powers of two, as Triton wants them (576 = 512 + 64).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxmoe.kernels.grouped_matmul import Tiles
from jaxmoe.kernels.shared_memory import fitting_rows, num_stages

QUERY_ROWS = 128  # tokens of a tile
_KV_ROWS = 64  # positions of a block: keys, values and scores of one fit the shared memory
# Of `paged_decode` on a GPU whose shared memory does not hold 64 positions of wide latents
# (DeepSeek's on consumer cards); tensor cores take no fewer.
_LEAST_KV_ROWS = 16
_FLASH_WARPS = 8
# Keys and values of 64 positions in flight; wide heads leave room for two.
_FLASH_STAGES, _WIDE_STAGES, _WIDE = 3, 2, 384
_DECODE_HEADS = 16  # the least that tensor cores take; 32 or more heads are several programs
_MASKED = -1e30  # not -inf: a row whose block is masked whole must not make inf - inf


@dataclasses.dataclass(frozen=True)
class Source:
    """Keys or values: `array [S, K, H]`; row numbers are slots of a paged cache or positions.

    start: first element of H that takes part. heads: query heads that share one of K.
    """

    array: jax.Array
    start: int
    size: int
    heads: int


def parts(size: int) -> list[tuple[int, int]]:
    """(start, size) of the powers of two that make up a head dim, largest first."""
    found, start = [], 0
    while start < size:
        part = 1 << ((size - start).bit_length() - 1)
        found.append((start, part))
        start += part
    return found


def sources(array: jax.Array, num_heads: int, size: int | None = None) -> list[Source]:
    """The parts of `array [S, K, H]` (its first `size` elements), for `num_heads` query heads."""
    heads = num_heads // array.shape[1]
    return [Source(array, start, n, heads) for start, n in parts(size or array.shape[2])]


def _grid(rows: jax.Array, start: int, size: int, *lead: Any, last: Any = None) -> tuple[Any, ...]:
    """Index arrays `[len(rows), size]` of (lead..., rows, last, start..): interpreted kernels take
    either slices or arrays for all dimensions.
    """
    shape = rows.shape[0], size
    fixed = [jnp.broadcast_to(i, shape) for i in lead]
    middle = [] if last is None else [jnp.broadcast_to(last, shape)]
    columns = jnp.broadcast_to(start + jnp.arange(size)[None], shape)
    return (*fixed, jnp.broadcast_to(rows[:, None], shape), *middle, columns)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _attend_blocks(
    queries: list[Any],
    row_positions: Any,
    load: Any,
    num_keys: int,
    num_values: int,
    value_sizes: list[int],
    blocks: tuple[Any, Any],
    scale: float,
    window: int | None,
    begin: Any,
    end: Any,
    kv_rows: int = _KV_ROWS,
):
    """Running softmax over blocks `[first, last)`: sums of each value part, maxima, denominators.

    row_positions: `[M]` last position each row of the tile sees. load(kind, part, block):
    `[kv_rows, size]` of keys ("k") or values ("v"). begin, end: positions outside take no part.
    """
    num_rows = row_positions.shape[0]

    def step(block, state):
        sums, top, total = state
        at = block * kv_rows + jnp.arange(kv_rows)
        scores = jnp.zeros((num_rows, kv_rows), jnp.float32)
        keys = [load("k", i, block) for i in range(num_keys)]
        for q, key in zip(queries, keys, strict=True):
            scores += _dot(q, key, (1, 1))
        seen = (at[None] <= row_positions[:, None]) & (at[None] >= begin) & (at[None] < end)
        if window is not None:
            seen &= at[None] > row_positions[:, None] - window
        scores = jnp.where(seen, scores * scale, _MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        decay = jnp.exp(top - new_top)
        total = total * decay + jnp.sum(weights, axis=1)
        out = []
        for i in range(num_values):
            value = load("v", i, block)
            out.append(sums[i] * decay[:, None] + _dot(weights.astype(value.dtype), value, (1, 0)))
        return tuple(out), new_top, total

    init = (
        tuple(jnp.zeros((num_rows, size), jnp.float32) for size in value_sizes),
        jnp.full((num_rows,), _MASKED, jnp.float32),
        jnp.zeros((num_rows,), jnp.float32),
    )
    return jax.lax.fori_loop(*blocks, step, init)


def flash_attention(
    q: jax.Array,
    keys: list[Source],
    values: list[Source],
    tiles: Tiles,
    positions: jax.Array,
    block_tables: jax.Array | None,
    *,
    page_size: int = 1,
    span: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of packed tokens.

    Args:
        q: `[T, N, H]`; H is the keys' parts in order.
        keys, values: see `Source`. With `block_tables [R, MP]` their rows are slots of pages of
            `page_size`, else positions counted from span[0].
        tiles: of `QUERY_ROWS` tokens of one row each; `expert` says which row.
        positions: `[T]` int32, ascending within a row.
        span: int32 `[2]`: only positions from span[0], a multiple of 64, up to span[1] take part;
            default: all.

    Returns:
        float32 `[T, N, V]` and the log of each softmax's denominator `[T, N]` float32, for
        `merge`. Tokens of no tile: not written.
    """
    num_tokens, num_heads, _ = q.shape
    q_parts = []
    for source in keys:
        q_parts.append((sum(n for _, n in q_parts), source.size))
    v_dim = sum(s.size for s in values)
    stages = num_stages(
        _FLASH_STAGES if q.shape[2] + v_dim < _WIDE else _WIDE_STAGES,
        QUERY_ROWS * q.shape[2] * q.dtype.itemsize,
        _KV_ROWS * (q.shape[2] + v_dim) * values[0].array.dtype.itemsize,
        interpret=interpret,
    )
    arrays = [s.array for s in (*keys, *values)]
    if span is None:
        span = jnp.array([0, 2**30], jnp.int32)
    table = jnp.zeros((1, 1), jnp.int32) if block_tables is None else block_tables

    def kernel(row_ref, begin_ref, end_ref, position_ref, table_ref, span_ref, q_ref, *refs):
        o_ref, lse_ref = refs[-2:]
        key_refs, value_refs = refs[: len(keys)], refs[len(keys) : len(keys) + len(values)]
        tile, head = pl.program_id(0), pl.program_id(1)
        first, last = begin_ref[tile], end_ref[tile]

        @pl.when(first < last)
        def _():
            row = row_ref[tile]
            tokens = first + jnp.arange(QUERY_ROWS)
            here = tokens < last
            at = plgpu.load(position_ref.at[pl.ds(first, QUERY_ROWS)], mask=here, other=-1)
            begin, end = span_ref[0], span_ref[1]
            queries = [
                plgpu.load(
                    q_ref.at[pl.ds(first, QUERY_ROWS), head, pl.ds(start, size)],
                    mask=jnp.broadcast_to(here[:, None], (QUERY_ROWS, size)),
                    other=0.0,
                )
                for start, size in q_parts
            ]
            most = jnp.minimum(jnp.max(at) + 1, end)

            def load(kind, i, block):
                where = block * _KV_ROWS + jnp.arange(_KV_ROWS)
                source = (keys if kind == "k" else values)[i]
                ref = (key_refs if kind == "k" else value_refs)[i]
                used = (where < most) & (where >= begin)
                if block_tables is None:
                    # One slice, which the compiler turns into wide asynchronous copies.
                    at_row = pl.ds(block * _KV_ROWS - begin, _KV_ROWS)
                    at_column = pl.ds(source.start, source.size)
                    return plgpu.load(
                        ref.at[at_row, head // source.heads, at_column],
                        mask=jnp.broadcast_to(used[:, None], (_KV_ROWS, source.size)),
                        other=0.0,
                    )
                column = jnp.where(used, where // page_size, 0)
                page = plgpu.load(
                    table_ref.at[jnp.broadcast_to(row, column.shape), column],
                    mask=used,
                    other=0,
                )
                rows = page * page_size + where % page_size
                return plgpu.load(
                    ref.at[
                        _grid(
                            jnp.where(used, rows, 0),
                            source.start,
                            source.size,
                            last=head // source.heads,
                        )
                    ],
                    mask=jnp.broadcast_to(used[:, None], (_KV_ROWS, source.size)),
                    other=0.0,
                )

            low = begin
            if window is not None:
                lowest = jnp.min(jnp.where(here, at, 2**30)) - window + 1
                low = jnp.maximum(low, lowest)
            blocks = low // _KV_ROWS, pl.cdiv(most, _KV_ROWS)
            sums, top, total = _attend_blocks(
                queries,
                at,
                load,
                len(keys),
                len(values),
                [s.size for s in values],
                blocks,
                scale,
                window,
                begin,
                end,
            )
            start = 0
            for source, part in zip(values, sums, strict=True):
                plgpu.store(
                    o_ref.at[pl.ds(first, QUERY_ROWS), head, pl.ds(start, source.size)],
                    part / jnp.maximum(total, 1e-30)[:, None],
                    mask=jnp.broadcast_to(here[:, None], (QUERY_ROWS, source.size)),
                )
                start += source.size
            lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), _MASKED)
            plgpu.store(lse_ref.at[pl.ds(first, QUERY_ROWS), head], lse, mask=here)

    return pl.pallas_call(
        kernel,
        grid=(tiles.row.shape[0], num_heads),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, num_heads, v_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_tokens, num_heads), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=_FLASH_WARPS, num_stages=stages),
        interpret=interpret,
        name="flash_attention",
    )(tiles.expert, tiles.row, tiles.end, positions, table, span, q, *arrays)


def paged_decode(
    q: jax.Array,
    keys: list[Source],
    values: list[Source],
    token_rows: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
    *,
    page_size: int,
    num_splits: int,
    scale: float,
    window: int | None = None,
    kv_rows: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of single tokens, each over its own row's pages, the context cut in `num_splits`.

    Returns float32 `[splits, T, N, V]` and `[splits, T, N]` for `merge`; tokens whose `token_rows`
    is -1 get zeros. kv_rows: positions of a block, a power of two up to 64; None: what fits.
    """
    num_tokens, num_heads, _ = q.shape
    shared = keys[0].heads  # query heads of one key head
    tile = max(_DECODE_HEADS, min(32, 1 << (shared - 1).bit_length()))
    per_kv = pl.cdiv(shared, tile)
    v_dim = sum(s.size for s in values)
    context = block_tables.shape[1] * page_size
    split_len = pl.cdiv(pl.cdiv(context, num_splits), _KV_ROWS) * _KV_ROWS
    arrays = [s.array for s in (*keys, *values)]
    if kv_rows is None:
        q_bytes = q.dtype.itemsize
        kv_rows = fitting_rows(
            _KV_ROWS,
            _LEAST_KV_ROWS,
            tile * q.shape[2] * q_bytes,
            (q.shape[2] + v_dim) * values[0].array.dtype.itemsize + tile * q_bytes,
            interpret=interpret,
        )

    def kernel(row_ref, position_ref, table_ref, q_ref, *refs):
        o_ref, lse_ref = refs[-2:]
        key_refs, value_refs = refs[: len(keys)], refs[len(keys) : len(keys) + len(values)]
        token, group, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        row = row_ref[token]
        position = jnp.where(row < 0, -1, position_ref[token])
        kv_head = group // per_kv
        heads = (group % per_kv) * tile + jnp.arange(tile)
        real = heads < shared
        heads = kv_head * shared + heads
        begin, end = split * split_len, (split + 1) * split_len
        most = jnp.minimum(position + 1, end)
        queries, start = [], 0
        for source in keys:
            queries.append(
                plgpu.load(
                    q_ref.at[_grid(heads, start, source.size, token)],
                    mask=jnp.broadcast_to(real[:, None], (tile, source.size)),
                    other=0.0,
                )
            )
            start += source.size

        def load(kind, i, block):
            where = block * kv_rows + jnp.arange(kv_rows)
            source = (keys if kind == "k" else values)[i]
            ref = (key_refs if kind == "k" else value_refs)[i]
            used = where < most
            column = jnp.where(used, where // page_size, 0)
            page = plgpu.load(
                table_ref.at[jnp.broadcast_to(jnp.maximum(row, 0), column.shape), column],
                mask=used,
                other=0,
            )
            slots = jnp.where(used, page * page_size + where % page_size, 0)
            return plgpu.load(
                ref.at[_grid(slots, source.start, source.size, last=kv_head)],
                mask=jnp.broadcast_to(used[:, None], (kv_rows, source.size)),
                other=0.0,
            )

        low = begin
        if window is not None:
            low = jnp.maximum(begin, position - window + 1)
        sums, top, total = _attend_blocks(
            queries,
            jnp.full((tile,), position),
            load,
            len(keys),
            len(values),
            [s.size for s in values],
            (low // kv_rows, pl.cdiv(most, kv_rows)),
            scale,
            window,
            begin,
            end,
            kv_rows,
        )
        start = 0
        for source, part in zip(values, sums, strict=True):
            plgpu.store(
                o_ref.at[_grid(heads, start, source.size, split, token)],
                part / jnp.maximum(total, 1e-30)[:, None],
                mask=jnp.broadcast_to(real[:, None], (tile, source.size)),
            )
            start += source.size
        lse = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), _MASKED)
        at = [jnp.broadcast_to(i, heads.shape) for i in (split, token)]
        plgpu.store(lse_ref.at[(*at, heads)], lse, mask=real)

    return pl.pallas_call(
        kernel,
        grid=(num_tokens, num_heads // shared * per_kv, num_splits),
        out_shape=(
            jax.ShapeDtypeStruct((num_splits, num_tokens, num_heads, v_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_splits, num_tokens, num_heads), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_decode",
    )(token_rows, positions, block_tables, q, *arrays)


def merge(out: jax.Array, lse: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """Joins partial results `[S, T, N, V]`, `[S, T, N]` over disjoint parts of the context.

    `sinks [N]` are scores of one more position without a value. Float32 `[T, N, V]`.
    """
    top = lse.max(axis=0)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    share = jnp.exp(lse - top)
    share = jnp.where(lse <= _MASKED, 0.0, share)
    total = share.sum(axis=0)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    weights = share / jnp.maximum(total, 1e-30)
    mixed = jnp.where(weights[..., None] > 0, out, 0.0) * weights[..., None]
    return mixed.sum(axis=0)
