"""Merged or overlapped: the model's limits, and a machine simulated without it."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from jaxmoe.scheduler.decode_batch import (
    DecodeBatchPolicy,
    DecodeRates,
    distinct_experts,
    effective_experts,
    microbatches_of,
    step_seconds,
)

US = 1e-6
# DeepSeek-V3 on two sockets (44 MB an expert at 500 GB/s) and a consumer GPU.
V3 = DecodeRates(
    num_moe_layers=58,
    num_experts=256,
    experts_per_token=8,
    attention_call_s=150 * US,
    attention_row_s=5 * US,
    attention_position_s=0.002 * US,
    shared_call_s=40 * US,
    shared_row_s=0.5 * US,
    expert_read_s=90 * US,
    expert_pair_s=3 * US,
    expert_call_s=20 * US,
    handover_s=10 * US,
)


def close(a, b):
    return a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize(
    "rows, per_token, effective, want",
    [(0, 8, 256, 0), (1, 8, 256, 8), (2, 8, 256, 15.75), (1000, 8, 256, 256), (5, 8, 8, 8)],
)
def test_distinct_experts(rows, per_token, effective, want):
    assert distinct_experts(rows, per_token, effective) == pytest.approx(want)


def test_effective_experts_is_the_inverse():
    for effective in (8.5, 20, 100, 256):
        for rows in (2, 4, 16):
            distinct = distinct_experts(rows, 8, effective)
            assert effective_experts(rows, distinct, 8, 256) == pytest.approx(effective, rel=1e-3)
    assert effective_experts(1, 8, 8, 256) == 256  # one row says nothing
    assert effective_experts(4, 300, 8, 256) == 256


def test_rows_are_dealt_as_the_program_deals_them():
    assert microbatches_of([1, 2, 3, 4, 5], 2) == [[1, 3, 5], [2, 4]]


def test_a_merged_step_is_the_sum_of_its_parts():
    layer = 150 + 5 * 2 + 0.002 * 300 + 10 + 20 + 90 * 15.75 + 3 * 16
    assert close(step_seconds(V3, [100, 200], 1), 58 * layer * US)
    slow_shared = dataclasses.replace(V3, shared_call_s=5000 * US, dense_s=7 * US)
    layer = 150 + 5 * 2 + 0.002 * 300 + 5000 + 0.5 * 2
    assert close(step_seconds(slow_shared, [100, 200], 1), (58 * layer + 7) * US)


def test_an_overlapped_step_costs_the_longer_of_the_two_and_the_first_attention():
    free = dict(shared_call_s=0, shared_row_s=0, expert_call_s=0, expert_pair_s=0, handover_s=0)
    even = dataclasses.replace(
        V3, attention_call_s=720 * US, attention_row_s=0, attention_position_s=0, **free
    )
    # Each microbatch's attention and experts take 720 us.
    assert close(step_seconds(even, [0, 0], 2), (2 * 58 + 1) * 720 * US)
    cpu_bound = dataclasses.replace(even, attention_call_s=100 * US)
    assert close(step_seconds(cpu_bound, [0, 0], 2), (100 + 2 * 58 * 720) * US)
    device_bound = dataclasses.replace(even, attention_call_s=1000 * US)
    assert close(step_seconds(device_bound, [0, 0], 2), (2 * 58 * 1000 + 720) * US)


@pytest.mark.parametrize(
    "contexts, changes, want",
    [
        ([1000], {}, 1),  # nothing to split
        ([100] * 2, {"attention_call_s": 10 * US, "attention_row_s": US}, 1),  # nothing to hide
        ([100] * 2, {}, 2),  # two rows share few experts
        ([60_000] * 4, {"attention_position_s": 0.01 * US}, 2),  # long contexts: worth hiding
        ([100] * 2, {"attention_call_s": 700 * US, "attention_row_s": 400 * US}, 2),
        # All rows use the same few experts: both halves would read all of them.
        ([1000] * 16, {"num_experts": 8, "expert_read_s": 500 * US}, 1),
    ],
)
def test_choices(contexts, changes, want):
    policy = DecodeBatchPolicy(dataclasses.replace(V3, **changes))
    assert policy.choose(contexts) == want
    assert DecodeBatchPolicy(V3, max_microbatches=1).choose(contexts) == 1


class Machine:
    """A machine whose costs vary from layer to layer and step to step, event by event; routing is
    skewed. It shares no code with the cost model.
    """

    def __init__(self, rates: DecodeRates, skew: float, seed: int):
        self.rates, self.random = rates, random.Random(seed)
        self.popularity = [(e + 1) ** -skew for e in range(rates.num_experts)]
        self.totals = {"experts_calls": 0, "experts_distinct": 0}

    def choices(self, num_rows: int) -> list[list[set[int]]]:
        """Experts of every layer and row."""
        layers = []
        for _ in range(self.rates.num_moe_layers):
            # The largest of u ** (1 / weight) are a weighted draw without repeats.
            layers.append([set(self.draw()) for _ in range(num_rows)])
        return layers

    def draw(self) -> list[int]:
        keys = [self.random.random() ** (1 / w) for w in self.popularity]
        return sorted(range(len(keys)), key=keys.__getitem__)[-self.rates.experts_per_token :]

    def seconds(self, contexts, chosen, n: int, jitter: int, count: bool = False) -> float:
        r, noise = self.rates, random.Random(jitter)
        groups = [list(range(m, len(contexts), n)) for m in range(n)]
        device = cpu = 0.0
        result_at = {}
        for layer, m in itertools.product(range(r.num_moe_layers + 1), range(n)):
            rows = groups[m]
            if layer:
                device += r.shared_call_s + r.shared_row_s * len(rows)
                device = max(device, result_at[m])
            if layer == r.num_moe_layers:
                continue
            positions = sum(contexts[i] for i in rows)
            device += noise.uniform(0.95, 1.05) * (
                r.attention_call_s
                + r.attention_row_s * len(rows)
                + r.attention_position_s * positions
            )
            distinct = len(set().union(*(chosen[layer][i] for i in rows)))
            work = r.expert_call_s + r.expert_read_s * distinct
            work += r.expert_pair_s * len(rows) * r.experts_per_token
            cpu = max(cpu, device + r.handover_s / 2) + noise.uniform(0.95, 1.05) * work
            result_at[m] = cpu + r.handover_s / 2
            if count:
                self.totals["experts_calls"] += 1
                self.totals["experts_distinct"] += distinct
        return device


SCENARIOS = [
    pytest.param(batch, context, per_position, skew, id=f"{batch}x{context}-{per_position}-{skew}")
    for batch, context, per_position, skew in [
        (2, 200, 0.002, 0.5),
        (2, 30_000, 0.01, 0.5),
        (4, 1_000, 0.002, 1.0),
        (4, 60_000, 0.01, 0.0),
        (8, 4_000, 0.01, 1.0),
        (8, 100_000, 0.002, 0.5),
        (16, 500, 0.05, 1.5),
        (16, 20_000, 0.01, 0.5),
    ]
]


@pytest.mark.parametrize("batch, context, per_position, skew", SCENARIOS)
@pytest.mark.parametrize("miscalibrated", [1.0, 0.7])
def test_never_much_worse_than_the_better_fixed_choice(
    batch, context, per_position, skew, miscalibrated
):
    """Over a trace of batches that grow and shrink, with rates that are off on one side."""
    small = dict(num_moe_layers=6, num_experts=48, experts_per_token=4)
    rates = dataclasses.replace(V3, attention_position_s=per_position * US, **small)
    machine = Machine(rates, skew, seed=batch)
    believed = dataclasses.replace(rates, attention_position_s=miscalibrated * per_position * US)
    policy = DecodeBatchPolicy(believed, counters=lambda: machine.totals)
    trace = random.Random(1)
    taken, fixed, rows = 0.0, {1: 0.0, 2: 0.0}, batch
    for step in range(150):
        rows = min(batch, max(1, rows + trace.choice((-1, 0, 1))))
        contexts = [context + trace.randrange(context) for _ in range(rows)]
        chosen = machine.choices(rows)
        n = policy.choose(contexts)
        for m in fixed:
            possible = min(m, rows)
            fixed[m] += machine.seconds(contexts, chosen, possible, step)
        seconds = machine.seconds(contexts, chosen, n, step, count=True)
        policy.observe(seconds)
        taken += seconds
    assert taken <= 1.03 * min(fixed.values())


def test_a_model_that_is_wrong_is_corrected():
    """Overlapping is predicted to win and does not; steps say so."""
    rates = dataclasses.replace(V3, attention_call_s=300 * US)
    policy = DecodeBatchPolicy(rates)
    contexts = [100] * 4
    assert policy.choose(contexts) == 2
    policy.observe(2 * step_seconds(rates, contexts, 2))
    choices = []
    for _ in range(600):
        n = policy.choose(contexts)
        choices.append(n)
        policy.observe((2.0 if n == 2 else 1.0) * step_seconds(rates, contexts, n))
    # The first step says that all predictions are too low; in time the other is tried, and stays.
    assert choices[-1] == 1 and choices.count(1) > 300


def test_compiled_steps_are_not_learned_from():
    policy = DecodeBatchPolicy(V3)
    policy.choose([100] * 4)
    policy.skip()
    policy.observe(1e9)
    assert policy.predict([100] * 4, 1) == step_seconds(V3, [100] * 4, 1)
