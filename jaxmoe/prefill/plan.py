"""How a long prompt is computed in the device memory there is: pure arithmetic, no device.

The ring holds groups of experts, from all of a layer down to two slots (paper section 3.1). More
ring lets the loader run further ahead while attention computes; groups are as large as leaves
at least `_MIN_SLOTS` of them, since every group is a round of kernels over the prompt's tokens.

The other weights are resident, or pass through slots of their own beside the experts: a few percent
more to copy, for gigabytes of device memory less.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxmoe.common.errors import CapacityError

# Fewer slots and the loader waits for the model's attention; more gain nothing once a layer's worth
# of weights fits.
_MIN_SLOTS, _BEST_SLOTS = 2, 8
# As many let resident weights go before fewer slots do.
_ENOUGH_SLOTS = 4
_CHUNK_TOKENS = 4096  # of attention: large enough to fill a GPU, its temporaries stay below 2 GiB
_WINDOW_ROWS = 16384  # of experts, see kernels/experts.py
# Sizes in chunks that programs are compiled for.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclasses.dataclass(frozen=True)
class PromptShape:
    """What memory depends on. expert_bytes: one expert with its scales, in the store's format.

    attention_bytes: temporaries of attention per token of a chunk (heads, expanded keys).
    """

    num_experts: int
    experts_per_token: int
    expert_bytes: int
    hidden: int
    intermediate: int
    attention_bytes: int
    compute_bytes: int = 2


@dataclasses.dataclass(frozen=True)
class OtherWeights:
    """Bytes of what is no routed expert: all of it, and of one layer of every shape there is."""

    all_bytes: int
    layer_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RingBounds:
    """What another user of the same slots asks of the ring (dslp_plan.py): experts of a group, how
    many slots at least, and bytes at most.
    """

    group_experts: int
    least_slots: int
    most_bytes: int


Weights = Literal["auto", "resident", "streamed"]


@dataclasses.dataclass(frozen=True)
class SlpPlan:
    """num_slots groups of `group_experts` each; prompts of up to `max_tokens` in one pass over the
    weights, attention in chunks of `chunk_tokens`, experts in windows of `window_rows`.

    weight_slots: that layers of one shape share for their other weights; 0: those are resident.
    weight_bytes: of these slots, or of the resident weights that the plan has to make room for.
    """

    group_experts: int
    num_slots: int
    chunk_tokens: int
    window_rows: int
    max_tokens: int
    ring_bytes: int
    activation_bytes: int
    weight_slots: int = 0
    weight_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        return self.ring_bytes + self.activation_bytes + self.weight_bytes

    def buffer_tokens(self, num_tokens: int) -> int:
        """Size of the buffers that hold a prompt of `num_tokens`."""
        chunks = -(-num_tokens // self.chunk_tokens)
        return next(c for c in LADDER if c >= chunks) * self.chunk_tokens

    def describe(self) -> str:
        others = ""
        if self.weight_slots:
            others = f"; other weights streamed through {self.weight_slots} slots a shape of layer"
        elif self.weight_bytes:
            others = "; other weights resident"
        if others:
            others += f", {self.weight_bytes / 2**30:.2f} GiB"
        return (
            f"ring of {self.num_slots} slots of {self.group_experts} experts, "
            f"{self.ring_bytes / 2**30:.2f} GiB; activations of {self.max_tokens} tokens "
            f"{self.activation_bytes / 2**30:.2f} GiB{others}"
        )


def activation_bytes(shape: PromptShape, tokens: int, chunk: int, window: int) -> int:
    """Device memory of a prompt's activations: the residual stream and the experts' input of all
    tokens, then the larger of a chunk's and a window's temporaries.
    """
    stream = tokens * (shape.hidden * (4 + shape.compute_bytes) + shape.experts_per_token * 32)
    in_chunk = chunk * (shape.attention_bytes + shape.hidden * (4 * 4 + 2 * shape.compute_bytes))
    in_window = window * (
        shape.hidden * (4 + shape.compute_bytes) + shape.intermediate * shape.compute_bytes
    )
    return stream + max(in_chunk, in_window)


def plan_slp(
    shape: PromptShape,
    free_bytes: int,
    max_prompt_tokens: int,
    *,
    chunk_tokens: int = _CHUNK_TOKENS,
    window_rows: int = _WINDOW_ROWS,
    others: OtherWeights | None = None,
    weights: Weights = "auto",
    bounds: RingBounds | None = None,
) -> SlpPlan:
    """The ring and the chunking for `free_bytes` of device memory.

    Activations of the longest prompt first, then as much ring as is left, at most one layer; where
    not even two slots fit beside them, prompts are taken in shorter passes.

    others: weights that need room too; None: they lie in other memory already. They are resident
    unless that costs longer passes or a ring of less than four slots, or `weights` says how it is
    to be. bounds: of the ring, where it is not this plan's alone.

    Raises CapacityError where two slots and one chunk do not fit.
    """
    sizes = max_prompt_tokens, chunk_tokens, window_rows
    if others is None:
        return _plan_beside(shape, free_bytes, *sizes, 0, 0, bounds)
    # Two slots let a layer's weights arrive while the one before it is computed.
    choices = [
        (0, others.all_bytes),
        (2, 2 * sum(others.layer_bytes)),
        (1, sum(others.layer_bytes)),
    ]
    if weights != "auto":
        choices = [c for c in choices if (c[0] == 0) == (weights == "resident")]
    plans: list[SlpPlan] = []
    failure: CapacityError | None = None
    for slots, nbytes in choices:
        try:
            plans.append(_plan_beside(shape, free_bytes, *sizes, slots, nbytes, bounds))
        except CapacityError as error:
            failure = error
    if not plans:
        assert failure is not None
        raise failure
    # The first of equals.
    return max(plans, key=lambda plan: (plan.max_tokens, min(plan.num_slots, _ENOUGH_SLOTS)))


def _plan_beside(
    shape: PromptShape,
    total_bytes: int,
    max_prompt_tokens: int,
    chunk_tokens: int,
    window_rows: int,
    weight_slots: int,
    weight_bytes: int,
    bounds: RingBounds | None,
) -> SlpPlan:
    """The plan beside `weight_bytes` of other weights."""
    free_bytes = total_bytes - weight_bytes
    groups, least_slots = range(1, shape.num_experts + 1), _MIN_SLOTS
    if bounds is not None:
        groups, least_slots = (bounds.group_experts,), bounds.least_slots
    smallest = least_slots * groups[0] * shape.expert_bytes
    enough = next((c for c in LADDER if c * chunk_tokens >= max_prompt_tokens), LADDER[-1])
    for chunks in reversed(LADDER[: LADDER.index(enough) + 1]):
        tokens = chunks * chunk_tokens
        used = activation_bytes(shape, tokens, chunk_tokens, window_rows)
        if used + smallest <= free_bytes:
            break
    else:
        need = activation_bytes(shape, chunk_tokens, chunk_tokens, window_rows) + smallest
        need += weight_bytes
        raise CapacityError(
            f"streaming experts to the device needs {need / 2**30:.2f} GiB of its memory, "
            f"{total_bytes / 2**30:.2f} GiB are free; lower kv_cache_gb, or use --prefill=chunked"
        )
    room = free_bytes - used if bounds is None else min(free_bytes - used, bounds.most_bytes)
    fit = room // shape.expert_bytes  # experts that the ring can hold
    choices = []
    for group in groups:
        if shape.num_experts % group:
            continue
        count = shape.num_experts // group
        # Slots divide the groups: a layer's groups lie in the same slots as every other layer's,
        # and one program serves all.
        slots = max(
            (s for s in range(1, count + 1) if count % s == 0 and s * group <= fit), default=0
        )
        if slots >= least_slots:
            choices.append((min(slots, _BEST_SLOTS), slots * group, group, slots))
    _, held, group, slots = max(choices)
    return SlpPlan(
        group,
        slots,
        chunk_tokens,
        window_rows,
        tokens,
        held * shape.expert_bytes,
        used,
        weight_slots,
        weight_bytes,
    )
