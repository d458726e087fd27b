"""The planner by hand-made tables."""

from __future__ import annotations

import dataclasses

import pytest

from jaxmoe.common.errors import CapacityError
from jaxmoe.prefill.dslp_plan import plan_dslp, plan_together
from jaxmoe.prefill.plan import OtherWeights, PromptShape, activation_bytes, plan_slp

GB = 10**9
V3 = PromptShape(
    num_experts=256,
    experts_per_token=8,
    expert_bytes=3 * 7168 * 2048 + 3 * 896 * 4,
    hidden=7168,
    intermediate=2048,
    attention_bytes=500_000,
)


@pytest.mark.parametrize(
    "free_gb, tokens, slots, group",
    [
        (60, 32768, 8, 32),  # a whole layer in the ring
        (18, 32768, 8, 32),
        (12, 32768, 8, 16),
        (6, 32768, 8, 4),
        (4.4, 32768, 4, 1),
        (3.5, 16384, 2, 1),  # longer prompts take more than one pass
    ],
)
def test_ring_takes_what_activations_leave(free_gb, tokens, slots, group):
    plan = plan_slp(V3, int(free_gb * GB), 32768)
    assert (plan.max_tokens, plan.num_slots, plan.group_experts) == (tokens, slots, group)
    assert plan.device_bytes <= free_gb * GB
    assert plan.ring_bytes == slots * group * V3.expert_bytes
    # The same slots serve every layer.
    assert (256 // group) % slots == 0


def test_every_choice_fits_and_serves_every_layer():
    for experts in (8, 60, 64, 128, 160, 384):
        shape = dataclasses.replace(V3, num_experts=experts)
        for free in range(int(3.2 * GB), 40 * GB, GB // 2):
            plan = plan_slp(shape, free, 20000)
            assert plan.device_bytes <= free
            assert plan.num_slots >= 2
            assert experts % plan.group_experts == 0
            assert experts // plan.group_experts % plan.num_slots == 0


def test_too_little_memory_is_said():
    need = activation_bytes(V3, 4096, 4096, 16384) + 2 * V3.expert_bytes
    plan_slp(V3, need, 32768)
    with pytest.raises(CapacityError, match="GiB are free"):
        plan_slp(V3, need - 1, 32768)


def test_buffers_come_in_few_sizes():
    plan = plan_slp(V3, 60 * GB, 65536)
    sizes = {plan.buffer_tokens(n) for n in range(1, 65537, 97)}
    assert len(sizes) <= 9
    assert all(plan.buffer_tokens(n) >= n for n in range(1, 65537, 97))


# DeepSeek-V3 but for its experts: 17.8 GiB, 583 MB of a dense layer, 240 MB of one with experts.
OTHERS = OtherWeights(19_100_000_000, (583_000_000, 240_000_000))


@pytest.mark.parametrize(
    "free_gb, weight_slots, tokens, slots",
    [
        (60, 0, 32768, 8),
        (30, 0, 32768, 8),
        (23.5, 0, 32768, 4),  # resident as long as the ring has four slots
        (23.2, 2, 32768, 8),
        (14, 2, 32768, 8),  # what a card of 16 GB has to give
        (5.9, 2, 32768, 4),
        (5.7, 1, 32768, 8),  # rather one slot for a layer than two for experts
        (5.0, 1, 32768, 2),
        (4.5, 1, 16384, 4),
    ],
)
def test_other_weights_are_resident_where_that_costs_little(free_gb, weight_slots, tokens, slots):
    plan = plan_slp(V3, int(free_gb * GB), 32768, others=OTHERS)
    assert (plan.weight_slots, plan.max_tokens, plan.num_slots) == (weight_slots, tokens, slots)
    assert plan.device_bytes <= free_gb * GB
    want = weight_slots * sum(OTHERS.layer_bytes) if weight_slots else OTHERS.all_bytes
    assert plan.weight_bytes == want
    how = "streamed through" if weight_slots else "resident"
    assert how in plan.describe() and f"{want / 2**30:.2f} GiB" in plan.describe()


def test_how_other_weights_go_may_be_said():
    assert plan_slp(V3, 60 * GB, 32768, others=OTHERS, weights="streamed").weight_slots == 2
    with pytest.raises(CapacityError, match=r"needs 20\.\d\d GiB of its memory, 13"):
        plan_slp(V3, 14 * GB, 32768, others=OTHERS, weights="resident")
    with pytest.raises(CapacityError, match="GiB are free"):
        plan_slp(V3, 2 * GB, 32768, others=OTHERS)


def together(free_gb: float, others_gb: float, shape=V3, ranks=2):
    """For a first device with so much memory, and others with so much each."""
    least = int(min(free_gb, others_gb) * GB)
    dslp = plan_dslp(shape, ranks, least, 32768, kv_bytes=1152, max_context=32768)
    return plan_together(dslp, int(free_gb * GB), 32768)


@pytest.mark.parametrize(
    "free_gb, others_gb, group, slp_slots, dslp_slots",
    [
        (60, 60, 16, 16, 8),  # a whole layer, and the half of one
        (12, 12, 16, 8, 8),
        (12, 60, 16, 8, 8),  # the rings are of one length, whatever the others have
        (12, 6.5, 4, 32, 8),  # but the first one's own may be longer
        (6, 60, 2, 8, 8),
    ],
)
def test_one_ring_for_two_ways(free_gb, others_gb, group, slp_slots, dslp_slots):
    plan = together(free_gb, others_gb)
    slp, rank = plan.slp, plan.dslp.rank
    assert (slp.group_experts, slp.num_slots, rank.num_slots) == (group, slp_slots, dslp_slots)
    assert slp.max_tokens == plan.dslp.max_tokens == 32768
    assert plan_slp(V3, int(free_gb * GB), 32768, bounds=plan.bounds) == slp


def test_two_ways_fit_where_one_does():
    for experts in (8, 60, 128, 160, 256, 384):
        shape = dataclasses.replace(V3, num_experts=experts)
        for ranks in (2, 4):
            for free, others in ((6, 6), (9, 30), (30, 9), (13.7, 14), (40, 40)):
                plan = together(free, others, shape, ranks)
                slp, dslp = plan.slp, plan.dslp
                assert plan.first_bytes <= free * GB and dslp.device_bytes <= others * GB
                assert slp.group_experts == dslp.rank.group_experts
                assert slp.num_slots >= dslp.rank.num_slots
                assert experts // slp.group_experts % slp.num_slots == 0


def test_where_two_ways_cannot_share_is_said():
    with pytest.raises(CapacityError, match="257 experts cannot be dealt evenly to 2"):
        together(40, 40, dataclasses.replace(V3, num_experts=257))
    with pytest.raises(CapacityError, match="GiB"):
        together(40, 2)
