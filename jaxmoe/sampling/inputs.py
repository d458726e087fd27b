"""What the sampler needs to know about each row of a step, packed into two small arrays on the
host.

Few and small arrays keep the dispatch of a step cheap. The columns are named once, here;
`pack_rows` writes them with numpy and `RowInputs.unpack` reads them inside the compiled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.sampling_params import (
    MAX_EOS_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

INT_COLUMNS = (
    "logit_index",  # which of the T tokens the row's logits come from
    "top_k",  # 0: off
    "num_logprobs",  # -1: none wanted
    "seed_high",
    "seed_low",
    "choice_idx",
    "token_idx",  # index of the token to draw among the row's outputs
    "slot",  # row of the token counts, -1: takes no part in them
    "num_prompt",
)
FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
# Before min_tokens everything that would end the text is banned, beside the request's own biases.
MAX_BIASES = MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """One row on the host. token_idx: how many tokens the sequence has written."""

    params: SamplingParams
    logit_index: int
    seed: int
    choice_idx: int
    token_idx: int
    slot: int
    num_prompt: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RowInputs:
    """Per-row inputs of a step: `ints [R, len(INT_COLUMNS)]` int32, `floats [R,
    len(FLOAT_COLUMNS)]` f32.
    """

    ints: jax.Array
    floats: jax.Array

    def __getattr__(self, name: str) -> jax.Array:
        """A column by name, `[R]`."""
        if name in INT_COLUMNS:
            return self.ints[:, INT_COLUMNS.index(name)]
        if name in FLOAT_COLUMNS:
            return self.floats[:, FLOAT_COLUMNS.index(name)]
        raise AttributeError(name)

    def keys(self) -> jax.Array:
        """Random keys `[R]`: the seed, folded with the choice and the token index."""

        def one(high, low, choice_idx, token_idx):
            words = jnp.stack([high, low]).astype(jnp.uint32)
            key = jax.random.wrap_key_data(words, impl="threefry2x32")
            # One number for both: n and max_model_len are bounded by 2**7 and 2**24.
            return jax.random.fold_in(key, (choice_idx << 24) + token_idx)

        return jax.vmap(one)(self.seed_high, self.seed_low, self.choice_idx, self.token_idx)


def pack_rows(rows: Seq[RowSettings], num_rows: int) -> RowInputs:
    """Host arrays for `rows`, padded to `num_rows` with greedy rows that read the first token's
    logits.
    """
    ints = np.zeros((num_rows, len(INT_COLUMNS)), np.int32)
    ints[:, INT_COLUMNS.index("num_logprobs")] = -1
    ints[:, INT_COLUMNS.index("slot")] = -1
    floats = np.zeros((num_rows, len(FLOAT_COLUMNS)), np.float32)
    for i, row in enumerate(rows):
        p = row.params
        seed = row.seed & (2**64 - 1)
        ints[i] = (
            row.logit_index,
            p.top_k,
            -1 if p.logprobs is None else p.logprobs,
            _as_int32(seed >> 32),
            _as_int32(seed & 0xFFFFFFFF),
            row.choice_idx,
            row.token_idx,
            row.slot,
            row.num_prompt,
        )
        floats[i] = (
            p.temperature,
            p.top_p,
            p.min_p,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
        )
    return RowInputs(ints, floats)  # pyright: ignore[reportArgumentType]


def _as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Biases:
    """Numbers added to single logits: `ids [R, MAX_BIASES]` int32 (-1: none), `values` f32 of that
    shape.
    """

    ids: jax.Array
    values: jax.Array


def pack_biases(rows: Seq[dict[int, float]], num_rows: int) -> Biases:
    """Host arrays of each row's map of token id to bias (minus infinity bans a token)."""
    ids = np.full((num_rows, MAX_BIASES), -1, np.int32)
    values = np.zeros((num_rows, MAX_BIASES), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = list(row.keys())
        values[i, : len(row)] = list(row.values())
    return Biases(ids, values)  # pyright: ignore[reportArgumentType]
