"""Linear maps of stored weights as FFI calls: one map, or one per head."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.ops import Weight
from jaxmoe.quant.formats import FORMATS

Family = Literal["vector", "matrix"]
FAMILY_CODES: dict[Family, np.int64] = {"vector": np.int64(0), "matrix": np.int64(1)}


def _operands(op: str, x: jax.Array, w: Weight) -> tuple[list[jax.Array], np.int64]:
    """x, data and the scales there are; and the format's code.

    The handler checks again; an error here comes at trace time.
    """
    if w.data.ndim != x.ndim or x.shape[1:-1] != w.data.shape[:-2] or x.shape[-1] != w.num_columns:
        raise ValueError(
            f"{op}: x {x.shape} does not fit weights {w.data.shape} {w.data.dtype}: wanted "
            "x [T, K] for [N, K], or x [T, G, K] for [G, N, K]"
        )
    try:
        code = np.int64(FORMATS[w.format].code)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    return [x, w.data] if w.scale_inv is None else [x, w.data, w.scale_inv], code


def linear(
    runtime: CpuRuntime, family: Family, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """`[T, K] -> [T, N]`."""
    operands, code = _operands("linear", x, w)
    out = jax.ShapeDtypeStruct((x.shape[0], w.data.shape[0]), out_dtype or x.dtype)
    return jax.ffi.ffi_call("jaxmoe_linear", out)(
        *operands, runtime_id=np.int64(runtime.id), family=FAMILY_CODES[family], format=code
    )


def head_linear(
    runtime: CpuRuntime, family: Family, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """`[T, G, K] -> [T, G, N]`, map g for head g."""
    operands, code = _operands("head_linear", x, w)
    out = jax.ShapeDtypeStruct((*x.shape[:2], w.data.shape[1]), out_dtype or x.dtype)
    return jax.ffi.ffi_call("jaxmoe_head_linear", out)(
        *operands, runtime_id=np.int64(runtime.id), family=FAMILY_CODES[family], format=code
    )
