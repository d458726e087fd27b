"""Whether a decode step is computed merged or in overlapped microbatches (decode/dual_batch.py).

Merging reads every weight once; overlapping hides one microbatch's attention behind another's
experts, but reads the weights outside the routed experts, and the experts that both chose, once for
each. A cost model of one step, with rates measured on this machine, says which is shorter;
measured steps correct it. Pure: no device, no clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

# A measured step moves the correction of its choice by this much: some ten steps to learn, single
# outliers do not matter.
_LEARNING = 0.1
# A choice that was not taken is tried again now and then, for its correction may be old; only if it
# is not expected to lose more than this, so that trying costs under 0.1 % of the time.
_TRY_EVERY_STEPS = 256
_TRY_WITHIN = 1.2


@dataclasses.dataclass(frozen=True)
class DecodeRates:
    """What the parts of a step cost on this machine; seconds are of one layer and call.

    attention_*: of the device between the layer's input and the router's result: once a call, a
    row, and a row's cached position. shared_*: of what else it computes while the experts run.
    expert_read_s: of reading one expert on the CPU. expert_pair_s: for each (token, expert) beyond
    it. expert_call_s: once a call. handover_s: an empty round trip between the two. dense_s: of
    layers without routed experts, and of the head, in all.
    """

    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    attention_call_s: float
    attention_row_s: float
    attention_position_s: float
    shared_call_s: float
    shared_row_s: float
    expert_read_s: float
    expert_pair_s: float
    expert_call_s: float
    handover_s: float
    dense_s: float = 0.0


def distinct_experts(num_rows: int, experts_per_token: int, effective_experts: float) -> float:
    """Expected distinct experts of a layer, were every row to choose among so many evenly."""
    if effective_experts <= experts_per_token:
        return float(experts_per_token if num_rows else 0)
    missed = (1 - experts_per_token / effective_experts) ** num_rows
    return effective_experts * (1 - missed)


def effective_experts(
    num_rows: int, distinct: float, experts_per_token: int, num_experts: int
) -> float:
    """Among how many experts rows that met `distinct` of them chose, as if evenly: real routing is
    uneven, and rows of one text are alike.
    """
    low, high = float(experts_per_token), float(num_experts)
    if num_rows < 2 or distinct >= distinct_experts(num_rows, experts_per_token, high):
        return high
    for _ in range(30):
        middle = (low + high) / 2
        if distinct_experts(num_rows, experts_per_token, middle) < distinct:
            low = middle
        else:
            high = middle
    return high


def microbatches_of(contexts: Sequence[int], n: int) -> list[Sequence[int]]:
    """The rows of each microbatch, as `decode.dual_batch.split_step` deals them."""
    return [contexts[m::n] for m in range(n)]


def step_seconds(
    rates: DecodeRates, contexts: Sequence[int], n: int, effective: float | None = None
) -> float:
    """Predicted time of a decode step of rows with these cached positions, in n microbatches.

    Follows the program's order with two clocks: the device's, and the CPU's, which works submitted
    calls off one after the other. n = 1 is the merged step.
    """
    r = rates
    if effective is None:
        effective = r.num_experts
    attention, shared, experts = [], [], []
    for rows in microbatches_of(contexts, n):
        count = len(rows)
        attention.append(
            r.attention_call_s + r.attention_row_s * count + r.attention_position_s * sum(rows)
        )
        shared.append(r.shared_call_s + r.shared_row_s * count)
        distinct = distinct_experts(count, r.experts_per_token, effective)
        experts.append(
            r.expert_call_s
            + r.expert_read_s * distinct
            + r.expert_pair_s * count * r.experts_per_token
        )
    device = cpu = 0.0
    done: list[float] = [0.0] * n
    for layer in range(r.num_moe_layers):
        for m in range(n):
            if layer:
                device = max(device + shared[m], done[m])
            device += attention[m]
            cpu = max(cpu, device + r.handover_s / 2) + experts[m]
            done[m] = cpu + r.handover_s / 2
    for m in range(n):
        device = max(device + shared[m], done[m])
    return device + r.dense_s


class DecodeBatchPolicy:
    """Chooses for each step, and learns from how long it took.

    rates: calibrated. max_microbatches: 1 turns overlapping off. counters: totals of
    `experts_calls` and `experts_distinct` of the CPU (`CpuRuntime.stats`), for how alike the rows'
    choices are.
    """

    def __init__(
        self,
        rates: DecodeRates,
        *,
        max_microbatches: int = 2,
        counters: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        self._rates = rates
        self._choices = [n for n in range(1, max_microbatches + 1)]
        self._counters = counters
        self._effective = float(rates.num_experts)
        self._correction: dict[int, float] = {}  # measured / predicted, of choices that were taken
        self._since_tried = dict.fromkeys(self._choices, 0)
        self._pending: tuple[int, int, float, tuple[int, int]] | None = None

    def predict(self, contexts: Sequence[int], n: int) -> float:
        """Seconds of the step, corrected by what was measured."""
        correction = self._correction.get(n)
        if correction is None:  # not taken yet: as far off as the others
            known = self._correction.values()
            correction = sum(known) / len(known) if known else 1.0
        return correction * step_seconds(self._rates, contexts, n, self._effective)

    def choose(self, contexts: Sequence[int]) -> int:
        """In how many microbatches to compute a step of rows with these cached positions."""
        possible = [n for n in self._choices if n <= len(contexts)] or [1]
        cost = {n: self.predict(contexts, n) for n in possible}
        best = min(possible, key=cost.__getitem__)
        for n in possible:
            self._since_tried[n] += 1
            old = self._since_tried[n] >= _TRY_EVERY_STEPS and cost[n] < _TRY_WITHIN * cost[best]
            if n != best and old:
                best = n
                break
        self._since_tried[best] = 0
        predicted = step_seconds(self._rates, contexts, best, self._effective)
        self._pending = best, len(contexts), predicted, self._totals()
        return best

    def observe(self, seconds: float) -> None:
        """How long the step took that was chosen for last; not for steps that were compiled."""
        if self._pending is None:
            return
        n, num_rows, predicted, before = self._pending
        self._pending = None
        old = self._correction.get(n)
        ratio = seconds / predicted
        self._correction[n] = ratio if old is None else old + _LEARNING * (ratio - old)
        calls, distinct = (new - was for new, was in zip(self._totals(), before, strict=True))
        if calls:
            rows = num_rows / n
            measured = effective_experts(
                round(rows),
                distinct / calls,
                self._rates.experts_per_token,
                self._rates.num_experts,
            )
            if rows >= 2:
                self._effective += _LEARNING * (measured - self._effective)

    def skip(self) -> None:
        """The step that was chosen for is not to be learned from."""
        self._pending = None

    def _totals(self) -> tuple[int, int]:
        if self._counters is None:
            return 0, 0
        totals = self._counters()
        return totals["experts_calls"], totals["experts_distinct"]
