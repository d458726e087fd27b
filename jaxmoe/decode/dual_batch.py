"""One decode step with its rows in N microbatches (paper §3.3): while the routed experts of one are
computed, the device does another's attention.

The order is forced by data dependence alone: each `experts_submit` carries the next microbatch's
state through, so that whatever is computed of it comes after. With N = 2, per layer:

    attention A · submit A · [rest and wait of B's layer before] · attention B · submit B · ...

A token's bits are those of the merged step: nothing it passes depends on its neighbours. What is
lost: weights outside the routed experts, and experts that both halves chose, are read once per
microbatch. Whether it pays is scheduler/decode_batch.py's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.models.decoder import Cache, Decoder
from jaxmoe.moe.moe_block import Submitted


class _State(NamedTuple):
    """Of a microbatch: float32 `h [T / N, D]` (`[T / N, S, D]` of streams) and its layer's experts,
    where they are under way.
    """

    h: jax.Array
    submitted: Submitted | None


def divides(num_tokens: int, num_rows: int, num_microbatches: int) -> bool:
    """Whether a step of this shape can be split: a decode, with as many tokens as rows."""
    return num_tokens == num_rows and num_tokens % num_microbatches == 0


def split_step(step: StepInputs, n: int) -> list[StepInputs]:
    """Tokens m, m + n, ... to microbatch m, so that padding, which is last, is shared evenly.

    Token i of the step must be row i's.
    """
    parts = []
    for m in range(n):
        part = jax.tree.map(lambda a, m=m: a[m::n], step)
        # Row m + n * j is row j of its microbatch; padding (-1) stays -1.
        parts.append(dataclasses.replace(part, token_rows=(part.token_rows - m) // n))
    return parts


def forward(
    model: Decoder,
    step: StepInputs,
    caches: Sequence[Cache],
    ops: Ops,
    logit_indices: jax.Array,
    num_microbatches: int,
) -> tuple[jax.Array, list[Cache]]:
    """As a call of the model (models/decoder.py), computed in microbatches."""
    n = num_microbatches
    num_tokens, num_rows = step.token_ids.shape[0], step.block_tables.shape[0]
    if not divides(num_tokens, num_rows, n):
        raise ValueError(
            f"{n} microbatches of {num_tokens} tokens and {num_rows} rows; wanted as many tokens "
            "as rows, and a multiple of the microbatches"
        )
    num_layers = model.config.num_layers
    first = next((i for i in range(num_layers) if model.is_moe(i)), num_layers)
    h = model.embed(step.token_ids)
    updated: list[Cache] = []
    # Dense layers before the first experts have nothing to overlap with.
    for i in range(first):
        h, cache, step = model.layer(i, h, caches[i], step, ops)
        updated.append(cache)
    steps = split_step(step, n)
    states = [_State(h[m::n], None) for m in range(n)]
    for i in range(first, num_layers):
        cache = caches[i]
        for m in range(n):
            h = _finished(model, i - 1, states[m], ops, m)
            h, cache, steps[m] = model.attention(i, h, cache, steps[m], ops)
            if model.is_moe(i):
                following = (m + 1) % n
                submitted, states[following] = model.mlp_submit(
                    i, h, steps[m], ops, states[following], slot=m
                )
                states[m] = _State(h, submitted)
            else:
                states[m] = _State(model.mlp(i, h, steps[m], ops), None)
        updated.append(cache)
    parts = [_finished(model, num_layers - 1, state, ops, m) for m, state in enumerate(states)]
    h = jnp.stack(parts, axis=1).reshape(num_tokens, *parts[0].shape[1:])
    updated += caches[num_layers:]
    return model.head(jnp.take(h, logit_indices, axis=0, mode="clip"), ops), updated


def _finished(model: Decoder, i: int, state: _State, ops: Ops, slot: int) -> jax.Array:
    """The state's `h` after layer i."""
    if state.submitted is None:
        return state.h
    return model.mlp_wait(i, state.h, state.submitted, ops, slot=slot)
