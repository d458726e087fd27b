"""Adds the weighted results of experts to the tokens that chose them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_BLOCK = 1024  # columns of a program: four 16-byte loads a thread


def add_expert_rows(
    y: jax.Array,
    rows: jax.Array,
    places: jax.Array,
    combine_weights: jax.Array,
    span: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`y [T, D]` float32 plus, for every token, its weighted rows among `rows`; in place.

    Args:
        rows: `[W, D]`: of the (token, expert) pairs numbered from span[0] up to span[1].
        places: `[T, A]` int32, the numbers of each token's pairs, expert ids ascending; -1: none.
        combine_weights: float32 `[T, A]`.
        span: int32 `[2]`.

    A token's rows are added in the order of `places`, whatever else is in `rows`.
    """
    num_tokens, hidden = y.shape
    per_token = places.shape[1]

    def kernel(span_ref, place_ref, weight_ref, rows_ref, y_ref, out_ref):
        token, block = pl.program_id(0), pl.program_id(1)
        cols = block * _BLOCK + jnp.arange(_BLOCK)
        at = pl.ds(block * _BLOCK, _BLOCK)
        begin, end = span_ref[0], span_ref[1]

        def number(a):
            place = place_ref[token, a]
            here = (place >= begin) & (place < end)
            return jnp.where(here, place - begin, -1)

        any_here = number(0) >= 0
        for a in range(1, per_token):
            any_here |= number(a) >= 0

        @pl.when(any_here)
        def _():
            total = plgpu.load(y_ref.at[token, at], mask=cols < hidden, other=0.0)
            for a in range(per_token):
                place = number(a)
                mask = (cols < hidden) & (place >= 0)
                row = plgpu.load(rows_ref.at[jnp.maximum(place, 0), at], mask=mask, other=0.0)
                total += weight_ref[token, a] * row.astype(jnp.float32)
            plgpu.store(out_ref.at[token, at], total, mask=cols < hidden)

    return pl.pallas_call(
        kernel,
        grid=(num_tokens, pl.cdiv(hidden, _BLOCK)),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        input_output_aliases={4: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="add_expert_rows",
    )(span, places, combine_weights, rows, y)
