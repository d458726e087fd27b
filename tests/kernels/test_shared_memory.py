"""Depth of pipelines and rows of blocks by a GPU's shared memory."""

import pytest

from jaxmoe.kernels import shared_memory


@pytest.mark.parametrize(
    "kind, pair, flash, latents",
    [
        ("NVIDIA H100 80GB HBM3", 3, 3, 64),
        ("NVIDIA H200 141GB HBM3e", 3, 3, 64),
        ("NVIDIA GH200 480GB", 3, 3, 64),
        ("NVIDIA A100-SXM4-80GB", 3, 3, 32),
        ("NVIDIA GeForce RTX 5090", 2, 2, 16),
        ("NVIDIA GeForce RTX 4090", 2, 2, 16),
        ("NVIDIA B1000", 2, 2, 16),
        ("", 2, 2, 16),
    ],
)
def test_as_many_stages_as_fit(kind, pair, flash, latents, monkeypatch):
    monkeypatch.setattr(shared_memory, "_device_kind", lambda: kind)
    # Gate and up of FP8 experts beside BF16 rows; DeepSeek's keys and values.
    assert shared_memory.num_stages(3, 0, 65536, interpret=False) == pair
    assert shared_memory.num_stages(3, 49152, 40960, interpret=False) == flash
    # Of BF16 experts: 288 KiB in three stages, which no GPU holds where all of them lie there.
    assert shared_memory.num_stages(3, 0, 98304, interpret=False) == 2
    assert shared_memory.num_stages(3, 0, 1 << 30, interpret=True) == 3
    assert shared_memory.num_stages(3, 0, 1 << 30, interpret=False) == 1
    # 32 of DeepSeek's heads in decode: queries of 576, latents twice, weights.
    rows = [
        shared_memory.fitting_rows(64, 16, 36864, 2240, interpret=interpret)
        for interpret in (False, True)
    ]
    assert rows == [latents, 64]
    assert shared_memory.fitting_rows(64, 16, 1 << 30, 1, interpret=False) == 16
