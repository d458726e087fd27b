"""How many guesses of the draft head a decode verifies (decode/drafting.py), if any.

A guess costs a row: the routed experts that it alone chooses are read for it, and the head's own
weights. It pays with the chance that it is right. Decode is bound by bytes, so the cost of a step
is what it reads; steps that were measured correct that, each number of guesses on its own, so that
what does not pay on this machine is given up whatever the bytes say. Pure: no device, no clock.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxmoe.scheduler.decode_batch import distinct_experts

# Before any guess was verified: DeepSeek-V3's second token is right in 85 to 90 of 100 cases (arXiv
# 2412.19437, section 5.4.3).
_FIRST_RATE = 0.85
# A verified guess moves the rate by this much: some fifty of them to learn.
_RATE_LEARNING = 0.02
# A measured step moves the correction of its number of guesses by this much.
_LEARNING = 0.1
# Now and then the other choice is tried again, for texts and loads change: long enough to learn
# from (the first step with guesses only makes them), and 3 % of the steps.
_TRY_EVERY_STEPS = 512
_TRY_STEPS = 16


@dataclasses.dataclass(frozen=True)
class DraftCosts:
    """Bytes that a decode reads.

    step_bytes: of all weights but routed experts, whatever the rows. expert_bytes: of one expert.
    head_bytes: of the draft head's layer, without routed experts. logits_bytes: of the output head,
    which every guess reads once more.
    """

    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    step_bytes: float
    expert_bytes: float
    head_bytes: float
    logits_bytes: float

    def of_step(self, num_sequences: int, num_guesses: int) -> float:
        """Of a step in which each sequence has so many guesses, and gets as many new ones."""
        rows = num_sequences * (1 + num_guesses)
        total = self.step_bytes + self.num_moe_layers * self._experts(rows)
        # The head goes over all rows once, whether or not it is asked, then over one a sequence.
        total += self.head_bytes + self._experts(rows) + num_guesses * self.logits_bytes
        further = max(num_guesses - 1, 0)
        return total + further * (self.head_bytes + self._experts(num_sequences))

    def _experts(self, rows: int) -> float:
        per_token = self.experts_per_token
        return self.expert_bytes * distinct_experts(rows, per_token, self.num_experts)


def expected_tokens(num_guesses: int, rate: float) -> float:
    """Of a sequence and step, were each guess right with this chance if those before it are."""
    return sum(rate**i for i in range(num_guesses + 1))


class DraftPolicy(Protocol):
    """What the engine asks before a step and tells after it."""

    most_guesses: int
    rate: float

    def choose(self, num_sequences: int) -> int:
        """Guesses of each sequence that the next step verifies, and makes anew."""
        ...

    def observe_guesses(self, verified: int, right: int) -> None:
        """Of one sequence in a step."""
        ...

    def observe_step(
        self, num_sequences: int, num_rows: int, num_guesses: int, seconds: float
    ) -> None:
        """A decode's time; not of steps that were compiled. num_guesses: as chosen."""
        ...


class AlwaysDraft:
    """As many as may be, whether or not it pays."""

    def __init__(self, most_guesses: int) -> None:
        self.most_guesses, self.rate = most_guesses, _FIRST_RATE

    def choose(self, num_sequences: int) -> int:
        return self.most_guesses

    def observe_guesses(self, verified: int, right: int) -> None:
        for i in range(min(right + 1, verified)):
            self.rate += _RATE_LEARNING * ((i < right) - self.rate)

    def observe_step(
        self, num_sequences: int, num_rows: int, num_guesses: int, seconds: float
    ) -> None:
        pass


class DraftWherePays(AlwaysDraft):
    """As many as give the most tokens a second, by the costs and what was measured."""

    def __init__(self, costs: DraftCosts, most_guesses: int) -> None:
        super().__init__(most_guesses)
        self._costs = costs
        self._correction: dict[int, float] = {}  # seconds a byte, by guesses
        self._since_tried = 0
        self._trying = 0

    def seconds_per_token(self, num_sequences: int, num_guesses: int) -> float:
        """Of one sequence, up to a factor before any step was measured."""
        tokens = expected_tokens(num_guesses, self.rate)
        correction = self._correction.get(num_guesses)
        if correction is None:  # not measured yet: as far off as the others
            known = self._correction.values()
            correction = sum(known) / len(known) if known else 1.0
        return correction * self._costs.of_step(num_sequences, num_guesses) / tokens

    def choose(self, num_sequences: int) -> int:
        costs = [self.seconds_per_token(num_sequences, n) for n in range(self.most_guesses + 1)]
        best = min(range(len(costs)), key=costs.__getitem__)
        if 0 not in self._correction:
            return 0  # what a gain is measured by
        self._since_tried += 1
        if self._since_tried >= _TRY_EVERY_STEPS:
            self._since_tried, self._trying = 0, _TRY_STEPS
        if self._trying:
            self._trying -= 1
            return 0 if best else 1
        return best

    def observe_step(
        self, num_sequences: int, num_rows: int, num_guesses: int, seconds: float
    ) -> None:
        # Steps in which not all sequences had guesses say nothing clear.
        if num_rows != num_sequences * (1 + num_guesses):
            return
        measured = seconds / self._costs.of_step(num_sequences, num_guesses)
        old = self._correction.get(num_guesses)
        self._correction[num_guesses] = (
            measured if old is None else old + _LEARNING * (measured - old)
        )
