"""How a long prompt is computed on R devices at once: pure arithmetic, no device."""

from __future__ import annotations

import dataclasses

from jaxmoe.attention.zigzag import chunk_length
from jaxmoe.common.errors import CapacityError
from jaxmoe.moe.small_ep import most_experts
from jaxmoe.prefill.plan import LADDER, PromptShape, RingBounds, SlpPlan, plan_slp

_CHUNK_TOKENS = 4096  # as prefill/plan.py, or the longest prompt's in whole blocks of keys
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class DslpPlan:
    """rank: of one device, with its own tokens and its share of the experts. exchange_bytes: what
    every device needs beside it, of all tokens: the experts' gathered input and partial sums, and
    keys on their way round. shape: of the prompts.
    """

    num_ranks: int
    rank: SlpPlan
    exchange_bytes: int
    shape: PromptShape

    @property
    def max_tokens(self) -> int:
        """Of a prompt, in one pass over the weights."""
        return self.num_ranks * self.rank.max_tokens

    @property
    def device_bytes(self) -> int:
        """Of each device."""
        return self.rank.ring_bytes + self.work_bytes

    @property
    def work_bytes(self) -> int:
        """Of each device, beside its ring."""
        return self.rank.activation_bytes + self.exchange_bytes

    def rows(self, num_tokens: int) -> int:
        """Size of the buffers that hold a rank's part of a prompt."""
        return self.rank.buffer_tokens(2 * chunk_length(num_tokens, self.num_ranks))

    def describe(self) -> str:
        return (
            f"on {self.num_ranks} devices, each with its share of the experts, a "
            f"{self.rank.describe()} of its own and {self.exchange_bytes / 2**30:.2f} GiB of all"
        )


def plan_dslp(
    shape: PromptShape,
    num_ranks: int,
    free_bytes: int,
    max_prompt_tokens: int,
    *,
    kv_bytes: int,
    max_context: int,
    chunk_tokens: int | None = None,
) -> DslpPlan:
    """The same ring and chunking on every device; `free_bytes` is that of the one with the least.

    kv_bytes: of a position in one layer. max_context: positions that a prefix may have.

    Raises: CapacityError where two slots and one chunk do not fit.
    """
    if chunk_tokens is None:
        longest = 2 * chunk_length(max_prompt_tokens, num_ranks)
        chunk_tokens = min(_CHUNK_TOKENS, -(-longest // _BLOCK) * _BLOCK)
    assert chunk_tokens % 2 == 0, chunk_tokens
    own = dataclasses.replace(shape, num_experts=most_experts(shape.num_experts, num_ranks))
    most = -(-max_prompt_tokens // num_ranks)
    enough = next((c for c in LADDER if c * chunk_tokens >= most), LADDER[-1])
    error = None
    for chunks in reversed(LADDER[: LADDER.index(enough) + 1]):
        tokens = chunks * chunk_tokens
        exchange = num_ranks * tokens * exchanged_bytes(shape)
        # What is held, what visits and what comes next.
        exchange += 3 * kv_bytes * (tokens + -(-max_context // num_ranks))
        try:
            plan = plan_slp(own, free_bytes - exchange, tokens, chunk_tokens=chunk_tokens)
        except CapacityError as e:
            error = e
            continue
        if plan.max_tokens == tokens:
            return DslpPlan(num_ranks, plan, exchange, shape)
    raise error or CapacityError(
        f"{free_bytes / 2**30:.2f} GiB of free device memory hold no ring of experts on "
        f"{num_ranks} devices; lower kv_cache_gb, or use --prefill=chunked"
    )


@dataclasses.dataclass(frozen=True)
class TogetherPlan:
    """For a first device that computes prompts alone (slp) or as one of several (dslp), never both
    at once: its slots serve both, slp has all of them and dslp the first ones. bounds: that the
    first's ring is to be planned within.
    """

    slp: SlpPlan
    dslp: DslpPlan
    bounds: RingBounds

    @property
    def first_bytes(self) -> int:
        """Of the first device: one ring, and whichever way's prompts take more."""
        return self.slp.ring_bytes + max(self.slp.activation_bytes, self.dslp.work_bytes)


def plan_together(dslp: DslpPlan, first_free_bytes: int, max_prompt_tokens: int) -> TogetherPlan:
    """Both ways for a first device with so much free memory.

    Raises: CapacityError where one memory of slots does not serve both.
    """
    shape = dslp.shape
    if shape.num_experts % dslp.num_ranks:  # groups of one size would not fill both
        raise CapacityError(
            f"{shape.num_experts} experts cannot be dealt evenly to {dslp.num_ranks} devices"
        )
    most = first_free_bytes - dslp.work_bytes
    bounds = RingBounds(dslp.rank.group_experts, dslp.rank.num_slots, most)
    slp = plan_slp(shape, first_free_bytes, max_prompt_tokens, bounds=bounds)
    return TogetherPlan(slp, dslp, bounds)


def exchanged_bytes(shape: PromptShape) -> int:
    """Of a token: the experts' input, ids and weights gathered, and partial sums."""
    return shape.hidden * (shape.compute_bytes + 4) + shape.experts_per_token * 8
