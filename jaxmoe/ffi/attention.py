"""KV cache writes and paged attention as FFI calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.linear import FAMILY_CODES, Family

# The context is cut at multiples of this many positions, rounded down to whole pages
# (paged_attention.cc): a page size that divides it makes the same sums as pages of one position.
CHUNK_POSITIONS = 512


def kv_write(pages: jax.Array, new: jax.Array, kv_slots: jax.Array) -> jax.Array:
    """Pages `[P, Z, K, H]` with `new [T, K, H]` at the flat slots `kv_slots [T]`; -1: nowhere.

    The result is the operand's buffer: in place when the cache is donated to the program.
    """
    if pages.ndim != 4 or new.shape != (kv_slots.shape[0], *pages.shape[2:]):
        raise ValueError(
            f"kv_write: cache {pages.shape}, new {new.shape}, kv_slots {kv_slots.shape}; wanted "
            "[P, Z, K, H], [T, K, H] and [T]"
        )
    out = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    call = jax.ffi.ffi_call("jaxmoe_kv_write", out, input_output_aliases={0: 0})
    return call(pages, new, kv_slots)


def paged_attention(
    runtime: CpuRuntime,
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    token_rows: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
    *,
    family: Family,
    scale: float,
    v_dim: int,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """f32 `[T, N, v_dim]`; arguments as in `reference.paged_attention`.

    family: "vector" computes in FP32; "matrix", the form for prompts, multiplies blocks of queries
    and keys, BF16 ones in BF16 where the CPU can.
    """
    keys = cache[0]
    if q.ndim != 3 or keys.ndim != 4 or q.shape[2] != keys.shape[3] or q.shape[1] % keys.shape[2]:
        raise ValueError(
            f"paged_attention: q {q.shape} and keys {keys.shape}; wanted [T, N, H] and [P, Z, K, H]"
            ", N a multiple of K"
        )
    if len(cache) == 2 and cache[1].shape != (*keys.shape[:3], v_dim):
        raise ValueError(
            f"paged_attention: values {cache[1].shape}; wanted {(*keys.shape[:3], v_dim)}"
        )
    if len(cache) == 1 and v_dim > keys.shape[3]:
        raise ValueError(f"paged_attention: v_dim {v_dim} of keys with {keys.shape[3]} elements")
    if window is not None and window < 1:
        raise ValueError(f"paged_attention: window {window}; wanted at least 1, or None")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != jnp.float32):
        raise ValueError(f"paged_attention: sinks {sinks.dtype} {sinks.shape}; wanted float32 [N]")
    out = jax.ShapeDtypeStruct((*q.shape[:2], v_dim), jnp.float32)
    return jax.ffi.ffi_call("jaxmoe_paged_attention", out)(
        q,
        keys,
        token_rows,
        positions,
        block_tables,
        *cache[1:],
        *(() if sinks is None else (sinks,)),
        runtime_id=np.int64(runtime.id),
        family=FAMILY_CODES[family],
        scale=np.float32(scale),
        window=np.int64(0 if window is None else window),
        has_sinks=sinks is not None,
    )
