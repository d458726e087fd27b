"""How many guesses pay: by bytes, by the rate of right ones, and by what was measured."""

import dataclasses
import random

import pytest

from jaxmoe.scheduler.draft_policy import (
    AlwaysDraft,
    DraftCosts,
    DraftWherePays,
    expected_tokens,
)

# About DeepSeek-V3 in its own precision, everything on the CPU.
V3 = DraftCosts(
    num_moe_layers=58,
    num_experts=256,
    experts_per_token=8,
    step_bytes=17e9,
    expert_bytes=44e6,
    head_bytes=0.3e9,
    logits_bytes=1.85e9,
)


def test_a_step_reads_each_weight_once_and_each_distinct_expert():
    costs = DraftCosts(2, 16, 4, 1000.0, 10.0, 300.0, 50.0)
    two_rows = 16 * (1 - (3 / 4) ** 2)  # distinct experts that two rows are expected to choose
    assert costs.of_step(1, 0) == pytest.approx(1000 + 2 * 40 + 300 + 40)
    assert costs.of_step(1, 1) == pytest.approx(1000 + 3 * 10 * two_rows + 300 + 50)
    three_rows = 16 * (1 - (3 / 4) ** 3)
    further = 300 + 40  # the head once more, over one row
    assert costs.of_step(1, 2) == pytest.approx(1000 + 3 * 10 * three_rows + 300 + 2 * 50 + further)


def test_expected_tokens():
    assert expected_tokens(0, 0.5) == 1
    assert expected_tokens(3, 0.5) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens(2, 1.0) == 3


def chosen(costs, rate, num_sequences, most=3):
    policy = DraftWherePays(costs, most)
    assert policy.choose(num_sequences) == 0, "nothing to measure a gain by"
    policy.observe_step(1, 1, 0, costs.of_step(1, 0) / 100e9)
    policy.rate = rate
    return policy.choose(num_sequences)


@pytest.mark.parametrize(
    ("changes", "rate", "num_sequences", "guesses"),
    [
        ({}, 0.0, 1, 0),
        ({}, 0.5, 1, 0),  # a guess reads almost all experts of a second token
        ({}, 0.7, 1, 1),
        ({}, 0.9, 1, 3),
        # Where only experts count (everything else on another device) it never pays alone,
        ({"step_bytes": 0, "head_bytes": 0, "logits_bytes": 0}, 0.9, 1, 0),
        # and does where many sequences have most experts read anyway.
        ({"step_bytes": 0, "head_bytes": 0, "logits_bytes": 0}, 0.9, 64, 3),
        ({"expert_bytes": 0}, 0.9, 1, 3),  # a dense model
        ({"num_experts": 8}, 0.9, 1, 3),  # every token chooses all experts
    ],
)
def test_guesses_by_bytes_and_rate(changes, rate, num_sequences, guesses):
    costs = dataclasses.replace(V3, **changes)
    assert chosen(costs, rate, num_sequences) == guesses


def test_the_rate_follows_the_guesses():
    policy, rng = AlwaysDraft(2), random.Random(0)
    for _ in range(2000):
        right = 0
        while right < 2 and rng.random() < 0.3:
            right += 1
        policy.observe_guesses(2, right)
    assert policy.rate == pytest.approx(0.3, abs=0.12)
    policy.observe_guesses(0, 0)  # nothing was verified: nothing is learned
    before = policy.rate
    policy.observe_guesses(0, 0)
    assert policy.rate == before


def test_what_measured_steps_deny_is_given_up_and_tried_again():
    policy = DraftWherePays(V3, 1)
    policy.rate = 0.9
    policy.observe_step(1, 1, 0, V3.of_step(1, 0) / 100e9)
    assert policy.choose(1) == 1
    for _ in range(50):
        policy.observe_step(1, 1, 0, V3.of_step(1, 0) / 100e9)
        policy.observe_step(1, 2, 1, 3 * V3.of_step(1, 1) / 100e9)
    tried = [policy.choose(1) for _ in range(2000)]
    assert 0 < sum(tried) < 0.05 * len(tried)
    for _ in range(100):  # the machine is quicker now
        policy.observe_step(1, 2, 1, V3.of_step(1, 1) / 100e9)
    again = [policy.choose(1) for _ in range(2000)]
    assert 0.95 * len(again) < sum(again) < len(again), "without guesses is measured again too"


def test_steps_in_which_some_had_no_guesses_are_not_learned_from():
    policy = DraftWherePays(V3, 1)
    policy.observe_step(2, 3, 1, 100.0)
    assert policy.seconds_per_token(1, 1) == pytest.approx(
        V3.of_step(1, 1) / expected_tokens(1, policy.rate)
    )
