"""Guesses of the tokens that follow, by the model's draft head, in the program of a step.

A decode that verifies guesses has a row for each of them, beside the one of the sequence's last
token: rows of one sequence at successive positions. What a row draws is what it would draw in a
step of its own, for nothing of a row depends on its neighbours; so a row's draw is a token of the
text exactly where all guesses before it were drawn too. Here the head goes over all rows, each with
the token it drew, and makes the next guesses from the last row that counts. What rows after it
wrote to the caches lies behind the sequence's end, and is written again before anything reads it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.models.decoder import Cache, Decoder
from jaxmoe.sampling.sampler import argmax


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DraftInputs:
    """following: `[T]` int32, the token after each of the step's, -1 where its row draws it.
    guesses: `[R]` int32: what the next row, of the same sequence, is fed as this row's draw, or -1.
    """

    following: jax.Array
    guesses: jax.Array


def last_counted(guesses: jax.Array, drawn: jax.Array, num_guesses: int) -> jax.Array:
    """`[R]` bool: whether a row is the last one of its sequence whose draw is a token of the text.

    guesses, drawn: `[R]` int32. num_guesses: that a sequence may have at most.
    """
    right = (guesses >= 0) & (guesses == drawn)
    begins = jnp.concatenate([jnp.ones(1, bool), guesses[:-1] < 0])
    before_right = jnp.concatenate([jnp.zeros(1, bool), right[:-1]])
    counts = begins
    for _ in range(num_guesses):
        before = jnp.concatenate([jnp.zeros(1, bool), counts[:-1]])
        counts = begins | (before & before_right)
    return counts & ~right


def propose(
    model: Decoder,
    h: jax.Array,
    drawn: jax.Array,
    step: StepInputs,
    inputs: DraftInputs,
    logit_index: jax.Array,
    caches: list[Cache],
    ops: Ops,
    *,
    num_guesses: int,
    most_guesses: int,
) -> tuple[jax.Array, list[Cache]]:
    """The draft head after a step.

    Args:
        h: float32 `[T, D]`, the residual stream after the model's layers.
        drawn: `[R]` int32, the rows' draws.
        logit_index: `[R]` int32, each row's last token.
        caches: of all layers, the draft head's last.
        num_guesses: wanted of each sequence; 0 only keeps the head's cache up to date.
        most_guesses: that a sequence may have in this step.

    Returns:
        Guesses `[R, num_guesses]` int32, -1 after the last one that there is room for in the
        sequence's pages and in rows that are not the last of their sequence; and the caches.
    """
    num_rows, (num_pages_each, page_size) = drawn.shape[0], _sizes(step, caches)
    rows = jnp.maximum(step.token_rows, 0)
    following = jnp.where(inputs.following >= 0, inputs.following, jnp.maximum(drawn[rows], 0))
    x = model.final_norm(h, ops)
    x, cache = model.draft_layer(x, following, caches[-1], step, ops)
    if num_guesses == 0:
        return jnp.zeros((num_rows, 0), jnp.int32), [*caches[:-1], cache]
    row_ids = jnp.arange(num_rows, dtype=jnp.int32)
    live = jnp.take(step.token_rows, logit_index, mode="clip") == row_ids
    live &= last_counted(inputs.guesses, drawn, most_guesses) & (drawn >= 0)
    positions = jnp.take(step.positions, logit_index, mode="clip")
    x = jnp.take(x, logit_index, axis=0, mode="clip")
    guesses = []
    for i in range(num_guesses):
        if i:
            positions = positions + 1
            page_idx = positions // page_size
            page = step.block_tables[row_ids, jnp.minimum(page_idx, num_pages_each - 1)]
            live &= (page >= 0) & (page_idx < num_pages_each)
            further = StepInputs(
                guesses[-1],
                jnp.where(live, positions, 0),
                jnp.where(live, row_ids, -1),
                jnp.where(live, page * page_size + positions % page_size, -1),
                step.block_tables,
            )
            ids = jnp.maximum(guesses[-1], 0)
            x, cache = model.draft_layer(x, ids, cache, further, ops)
        likeliest = lax.map(argmax, model.logits(x, ops))
        guesses.append(jnp.where(live, likeliest, -1))
    return jnp.stack(guesses, axis=1), [*caches[:-1], cache]


def _sizes(step: StepInputs, caches: list[Cache]) -> tuple[int, int]:
    """Pages of a block table, and positions of a page."""
    return step.block_tables.shape[1], caches[-1][0].shape[1]
