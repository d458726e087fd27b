"""Adjustments of logits that depend on the text so far: penalties, biases, bans, grammars' masks.

The counts of tokens live on the device, one row a running sequence, and are kept up to date with
the tokens that a step is fed, so that nothing but the new tokens travels. Only steps with a row
that asks for it carry them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.sampling.inputs import Biases, RowInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TokenCounts:
    """written `[slots, V]` int32: times each token was written; in_prompt `[slots, V]` bool."""

    written: jax.Array
    in_prompt: jax.Array

    @classmethod
    def zeros(cls, num_slots: int, vocab_size: int) -> TokenCounts:
        shape = (num_slots, vocab_size)
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.bool_))


def clear_slot(counts: TokenCounts, slot: jax.Array) -> TokenCounts:
    """Forgets the tokens of a slot, for its next owner."""
    return TokenCounts(counts.written.at[slot].set(0), counts.in_prompt.at[slot].set(False))


def count_prompt(counts: TokenCounts, slot: jax.Array, token_ids: jax.Array) -> TokenCounts:
    """Counts with these tokens in the slot's prompt; ids outside the vocabulary are left out."""
    in_prompt = counts.in_prompt.at[slot, token_ids].set(True, mode="drop")
    return TokenCounts(counts.written, in_prompt)


def count_tokens(
    counts: TokenCounts,
    token_ids: jax.Array,  # [T]
    positions: jax.Array,  # [T]
    token_rows: jax.Array,  # [T], -1: padding
    rows: RowInputs,
) -> TokenCounts:
    """Counts with the tokens that this step is fed. Rows whose slot is -1 are left out."""
    num_slots = counts.written.shape[0]
    row = jnp.maximum(token_rows, 0)
    slot = jnp.where(token_rows >= 0, rows.slot[row], -1)
    is_output = positions >= rows.num_prompt[row]
    away = num_slots  # out of range: dropped
    held = slot >= 0
    out_slot = jnp.where(held & is_output, slot, away)
    prompt_slot = jnp.where(held & ~is_output, slot, away)
    return TokenCounts(
        counts.written.at[out_slot, token_ids].add(1, mode="drop"),
        counts.in_prompt.at[prompt_slot, token_ids].set(True, mode="drop"),
    )


def adjust_row(
    logits: jax.Array,  # [V] f32
    written: jax.Array,  # [V] int32
    in_prompt: jax.Array,  # [V] bool
    repetition: jax.Array,
    presence: jax.Array,
    frequency: jax.Array,
    bias_ids: jax.Array,  # [MAX_BIASES]
    bias_values: jax.Array,
) -> jax.Array:
    """One row's logits after its penalties and biases.

    Repetition looks at prompt and output (positive logits are divided, negative multiplied);
    presence and frequency look at the output only, as in OpenAI's definition.
    """
    seen = in_prompt | (written > 0)
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, scaled, logits)
    logits = logits - presence * (written > 0) - frequency * written.astype(jnp.float32)
    ids = jnp.where(bias_ids >= 0, bias_ids, logits.shape[0])
    return logits.at[ids].add(bias_values, mode="drop")


def adjust(
    logits: jax.Array,  # [R, V] f32
    counts: TokenCounts,
    rows: RowInputs,
    biases: Biases,
) -> jax.Array:
    """`[R, V]` logits after each row's own adjustments; rows that asked for none pass unchanged."""

    def one(args):
        row_logits, slot, repetition, presence, frequency, ids, values = args
        at = jnp.maximum(slot, 0)
        return jax.lax.cond(
            slot >= 0,
            lambda: adjust_row(
                row_logits,
                counts.written[at],
                counts.in_prompt[at],
                repetition,
                presence,
                frequency,
                ids,
                values,
            ),
            lambda: row_logits,
        )

    return jax.lax.map(
        one,
        (
            logits,
            rows.slot,
            rows.repetition,
            rows.presence,
            rows.frequency,
            biases.ids,
            biases.values,
        ),
    )


def apply_masks(
    logits: jax.Array,  # [R, V] f32
    masks: jax.Array,  # [R, ceil(V / 32)] uint32, bit i % 32 of word i // 32: token i is allowed
) -> jax.Array:
    """`[R, V]` logits with minus infinity where a row's mask forbids. NaN stays, for it says that
    the model is broken.
    """
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [R, W, 32]
    allowed = bits.reshape(bits.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(allowed | jnp.isnan(logits), logits, -jnp.inf)
