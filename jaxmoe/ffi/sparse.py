"""Attention to selected positions, as dense attention over a cache whose pages hold one position.

A token's selected slots are then its block table, and it is a row of its own. The kernels of dense
attention serve as they are, and give a token that selects every position the bits they would give
it without a selection.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.ffi.ops import StepInputs


def as_pages_of_one(
    cache: tuple[jax.Array, ...],
    step: StepInputs,
    selected: jax.Array,
    num_selected: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], StepInputs]:
    """The cache `[P * Z, 1, K, H]` and the step whose `T` rows have `selected [T, top_k]` for
    tables, and attend the first `num_selected [T]` of them; None: as many as there are positions.
    No cache is written through them.
    """
    num_tokens, top_k = selected.shape
    own = jnp.arange(num_tokens, dtype=jnp.int32)
    single = dataclasses.replace(
        step,
        token_rows=jnp.where(step.token_rows < 0, -1, own),
        positions=jnp.minimum(
            step.positions if num_selected is None else num_selected - 1, top_k - 1
        ),
        block_tables=selected,
    )
    return tuple(a.reshape(-1, 1, *a.shape[2:]) for a in cache), single


def capacity(step: StepInputs, page_size: int) -> int:
    """Positions that a row's block table has pages for."""
    return step.block_tables.shape[1] * page_size
