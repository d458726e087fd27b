"""Counting what is sent, as XLA writes it for CPUs and for GPUs."""

from __future__ import annotations

import pytest

from jaxmoe.common.collectives import count_arrays, count_collectives, exchanged_bytes


@pytest.mark.parametrize(
    ("line", "kind", "arrays", "nbytes"),
    [
        ("%a = u16[8,4]{1,0} all-gather(%x), dimensions={0}", "all-gather", 1, 32),
        (
            "%a = ((s32[4,2]{1,0}, f32[4,3]{1,0}), (s32[8,2]{1,0}, f32[8,3]{1,0})) "
            "all-gather-start(%x, %y), dimensions={0}",
            "all-gather",
            2,
            32 + 48,
        ),
        (
            "%r = ((f32[8,4]{1,0}), f32[4,4]{1,0}) reduce-scatter-start(%x), dimensions={0}",
            "reduce-scatter",
            1,
            64,
        ),
        (
            "%p = (u16[8,1,4]{2,1,0}, u16[8,1,4]{2,1,0}, u32[], u32[]) "
            "collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            1,
            64,
        ),
        (
            "%p = ((u16[8,1,4]{2,1,0}, u16[2,1,4]{2,1,0}), (u16[8,1,4]{2,1,0}, u16[2,1,4]{2,1,0})) "
            "collective-permute-start(%x, %y), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            2,
            64 + 16,
        ),
        ("%r = f32[8,4]{1,0} all-reduce-start(%x), to_apply=%add", "all-reduce", 1, 128),
        (
            "%t = (u16[4,2]{1,0}, s32[4,1]{1,0}) all-to-all(%x, %y), dimensions={0}",
            "all-to-all",
            2,
            16,
        ),
    ],
)
def test_two_devices_send(line, kind, arrays, nbytes):
    assert count_collectives(line) == {kind: 1}
    assert count_arrays(line) == {kind: arrays}
    assert exchanged_bytes(line, 2) == {kind: nbytes}
