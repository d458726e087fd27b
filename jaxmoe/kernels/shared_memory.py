"""What a kernel may keep in a GPU's shared memory: how deep it loads ahead, which changes speed
only, and rows of a block, which change the order of additions too.
"""

from __future__ import annotations

import re

import jax

# Bytes that a block may have. Consumer cards since Ampere: 99 KiB.
_CONSUMER = 101_376
# Tensor cores that read shared memory while the next loads run (wgmma, tcgen05) keep all stages
# there; others have one of them in registers.
_ALL_STAGES = 232_448
_KNOWN = (
    (re.compile(r"\b(A100|A800|A30)\b"), 166_912),
    (re.compile(r"\bG?(H100|H200|H800|H20|B100|B200|B300)\b"), _ALL_STAGES),
)


def block_bytes(device_kind: str) -> int:
    """Of a GPU by its name; of one that is not known, what every one has."""
    return next((size for name, size in _KNOWN if name.search(device_kind)), _CONSUMER)


def num_stages(most: int, fixed_bytes: int, stage_bytes: int, *, interpret: bool) -> int:
    """At most `most` of Triton's stages for the GPU that is traced for: `stage_bytes` each, beside
    `fixed_bytes`.
    """
    if interpret:
        return most
    room = block_bytes(_device_kind())
    elsewhere = 0 if room == _ALL_STAGES else 1
    stages = most
    while stages > 1 and fixed_bytes + (stages - elsewhere) * stage_bytes > room:
        stages -= 1
    return stages


def fitting_rows(
    most: int, least: int, fixed_bytes: int, row_bytes: int, *, interpret: bool
) -> int:
    """Of a block, at most `most`, halved down to `least` until `row_bytes` each fit beside
    `fixed_bytes` on the GPU that is traced for.
    """
    rows = most
    room = None if interpret else block_bytes(_device_kind())
    while room is not None and rows > least and fixed_bytes + rows * row_bytes > room:
        rows //= 2
    return rows


def _device_kind() -> str:
    """Of the GPU that is compiled for, here or (kernels compiled ahead) elsewhere."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    try:
        return jax.local_devices(backend="cuda")[0].device_kind
    except RuntimeError:
        return ""
