"""How large the paged cache is: bytes of a token, pages that a budget buys, the context they allow.

One rule: the cache takes `kv_cache_gb`, or less where `max_num_seqs` whole sequences need less.
Left open, the budget is 512 MiB or one sequence of the `max_model_len` that was asked for,
whichever is larger; `max_model_len` left open is the model's own limit or what the budget holds,
whichever is smaller. Pure Python.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import ConfigError

DEFAULT_BUDGET_BYTES = 1 << 29
DEFAULT_STATE_BYTES = 1 << 30  # of kept states: 5 to 16 of the models there are


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """page_size positions a page, num_pages of them; max_model_len: longest prompt + output."""

    page_size: int
    num_pages: int
    max_model_len: int
    token_bytes: int

    @property
    def pages_per_sequence(self) -> int:
        """Width of a block table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def total_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def total_bytes(self) -> int:
        return self.total_tokens * self.token_bytes


def plan_cache(
    *,
    token_bytes: int,
    page_size: int,
    max_num_seqs: int,
    model_limit: int,
    max_model_len: int | None,
    kv_cache_gb: float | None,
) -> CacheLayout:
    """The layout for a model whose cache takes `token_bytes` a position and whose limit is
    `model_limit`.
    """
    if max_model_len is not None and max_model_len > model_limit:
        raise ConfigError(
            f"max_model_len: got {max_model_len}, but the model's positions end at {model_limit}; "
            f"use {model_limit} or less"
        )
    page_bytes = token_bytes * page_size
    if kv_cache_gb is not None:
        budget_pages = int(kv_cache_gb * 2**30) // page_bytes
    else:
        budget_pages = DEFAULT_BUDGET_BYTES // page_bytes
        if max_model_len is not None:
            budget_pages = max(budget_pages, -(-max_model_len // page_size))
    # A prompt of one token and one more is the least there can be.
    length = max_model_len or max(2, min(model_limit, budget_pages * page_size))
    pages = -(-length // page_size)
    if pages > budget_pages:
        need_gb = pages * page_bytes / 2**30
        raise ConfigError(
            f"kv_cache_gb: {kv_cache_gb} holds {budget_pages * page_size} tokens "
            f"({token_bytes} bytes each), but one sequence of max_model_len {length} needs "
            f"{need_gb:.3g}; raise kv_cache_gb or lower max_model_len"
        )
    return CacheLayout(page_size, min(budget_pages, max_num_seqs * pages), length, token_bytes)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Slots of recurrent state: one for each of num_running sequences, and num_kept that the prefix
    cache keeps states of prompts in.
    """

    slot_bytes: int
    num_running: int
    num_kept: int

    @property
    def num_slots(self) -> int:
        return self.num_running + self.num_kept

    @property
    def total_bytes(self) -> int:
        return self.num_slots * self.slot_bytes


def plan_states(
    *, slot_bytes: int, max_num_seqs: int, prefix_cache: bool, state_cache_gb: float | None
) -> StateLayout | None:
    """For a model whose sequences have `slot_bytes` of recurrent state each; None for 0."""
    if slot_bytes == 0:
        return None
    budget = DEFAULT_STATE_BYTES if state_cache_gb is None else int(state_cache_gb * 2**30)
    return StateLayout(slot_bytes, max_num_seqs, budget // slot_bytes if prefix_cache else 0)
