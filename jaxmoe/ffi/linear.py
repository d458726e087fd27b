"""Linear maps of stored weights as FFI calls: one map, or one per head."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.ops import Weight

Family = Literal["vector", "matrix"]
FAMILY_CODES: dict[Family, np.int64] = {"vector": np.int64(0), "matrix": np.int64(1)}


def _operands(op: str, x: jax.Array, w: Weight) -> list[jax.Array]:
    """x, data and, for FP8, scales. The handler checks again; an error here comes at trace time."""
    if (
        w.data.ndim != x.ndim
        or x.shape[1:-1] != w.data.shape[:-2]
        or x.shape[-1] != w.data.shape[-1]
    ):
        raise ValueError(
            f"{op}: x {x.shape} does not fit weights {w.data.shape}: wanted x [T, K] for [N, K], "
            "or x [T, G, K] for [G, N, K]"
        )
    if (w.data.dtype == jnp.float8_e4m3fn) != (w.scale_inv is not None):
        raise ValueError(
            f"{op}: weights of {w.data.dtype} {'with' if w.scale_inv is not None else 'without'} "
            "scale_inv; float8_e4m3fn needs it, other types have none"
        )
    return [x, w.data] if w.scale_inv is None else [x, w.data, w.scale_inv]


def linear(
    runtime: CpuRuntime, family: Family, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """`[T, K] -> [T, N]`."""
    operands = _operands("linear", x, w)
    out = jax.ShapeDtypeStruct((x.shape[0], w.data.shape[0]), out_dtype or x.dtype)
    return jax.ffi.ffi_call("jaxmoe_linear", out)(
        *operands, runtime_id=np.int64(runtime.id), family=FAMILY_CODES[family]
    )


def head_linear(
    runtime: CpuRuntime, family: Family, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """`[T, G, K] -> [T, G, N]`, map g for head g."""
    operands = _operands("head_linear", x, w)
    out = jax.ShapeDtypeStruct((*x.shape[:2], w.data.shape[1]), out_dtype or x.dtype)
    return jax.ffi.ffi_call("jaxmoe_head_linear", out)(
        *operands, runtime_id=np.int64(runtime.id), family=FAMILY_CODES[family]
    )
