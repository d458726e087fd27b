"""The choice of the positions that sparse attention attends, as an FFI call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.linear import FAMILY_CODES, Family
from jaxmoe.ffi.ops import StepInputs


def index_select(
    runtime: CpuRuntime,
    q: jax.Array,
    head_weights: jax.Array,
    pages: jax.Array,
    step: StepInputs,
    *,
    family: Family,
    top_k: int,
) -> jax.Array:
    """int32 `[T, top_k]`, as `Ops.select` returns it; the keys are in the pages already."""
    if q.ndim != 3 or pages.ndim != 4 or pages.shape[2:] != (1, q.shape[2]):
        raise ValueError(
            f"index_select: q {q.shape} and keys {pages.shape}; wanted [T, N, H] and [P, Z, 1, H]"
        )
    if top_k < 1:
        raise ValueError(f"index_select: top_k {top_k}; wanted at least 1")
    out = jax.ShapeDtypeStruct((q.shape[0], top_k), jnp.int32)
    return jax.ffi.ffi_call("jaxmoe_index_select", out)(
        q,
        head_weights,
        pages,
        step.token_rows,
        step.positions,
        step.block_tables,
        runtime_id=np.int64(runtime.id),
        family=FAMILY_CODES[family],
    )
