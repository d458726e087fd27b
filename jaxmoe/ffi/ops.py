"""The operations a model's layers are written against, and nothing else they may call.

`Ops` is the seam between model text and machine: `NativeOps` (ffi/native_ops.py) reaches the CPU
kernels through XLA FFI, `ReferenceOps` (ffi/reference.py) says the same in jnp. The reference is
the oracle of every kernel, what other platforms lower to, and what the demo model is trained with
(it has gradients).

Shapes use the letters of common/dims.py. T is the number of tokens packed in a step, from any
number of sequences; rows of padding have `token_rows == -1`, `kv_slots == -1` and expert ids of -1:
they cost no weight bytes and produce zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.config.model_config import ClampedSwiglu


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weight:
    """A linear map's weights as they lie in the checkpoint, row-major, outputs first.

    data: `[N, K]` (or `[G, N, K]` for per-head maps) bfloat16, float32 or float8_e4m3fn.
    scale_inv: float32 `[ceil(N/128), ceil(K/128)]` (or with a leading G); multiply to dequantize.
    None unless data is float8.
    """

    data: jax.Array
    scale_inv: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StepInputs:
    """What a step needs to know about its T packed tokens. All int32; padding as said above.

    token_ids, positions, token_rows, kv_slots: `[T]`. `token_rows` indexes `block_tables`;
    `kv_slots` is the flat cache slot (page * page_size + offset) the token's key and value are
    written to. block_tables: `[R, MP]` page ids of each row, -1 where unused.
    """

    token_ids: jax.Array
    positions: jax.Array
    token_rows: jax.Array
    kv_slots: jax.Array
    block_tables: jax.Array


# Moments of a compiled step that figures of where its time goes are told by.
Point = Literal["begin", "logits", "end"]


class Ops(Protocol):
    def mark(self, x: jax.Array, point: Point) -> jax.Array:
        """`x` itself; says, when it is ready, that the program has come to this point."""
        ...

    def map_rows(self, f: Callable[[Any], Any], x: Any) -> Any:
        """`f` of every row of the arrays `[T, ...]` in `x`, stacked: for all but single operations.

        XLA orders the sums of a reduction, and may choose how it computes functions such as rsqrt
        or exp, by the size of the whole array, so that a token's last bits would depend on how many
        others are in its step. Native operations see to it that they do not; where nothing hangs on
        it, rows are computed together.
        """
        ...

    def linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """`[T, K] -> [T, N]`: y = x Wᵀ, FP32 accumulation; result dtype defaults to x's."""
        ...

    def head_linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """`[T, G, K] -> [T, G, N]`: one map `[N, K]` per head, `w.data [G, N, K]`."""
        ...

    def experts(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Routed experts of `x [T, D]`: `expert_ids [T, A]` int32, `combine_weights [T, A]` f32.

        Returns f32 `[T, D]`: sum over a of combine_weights * down(silu(gate(x)) * up(x)). The
        weights of layer `moe_layer_idx` (0-based among the MoE layers) come from the store the ops
        object was made with. `activation` replaces silu(gate) * up; `biases`, float32 `[E, F]`
        each, are added to gate and up before it.
        """
        ...

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        *,
        scale: float,
        v_dim: int,
        window: int | None = None,
        sinks: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Causal attention of T packed tokens over their own sequences' paged cache.

        Writes `k_new [T, K, H]` (and `v_new [T, K, Hv]`) to the cache at `step.kv_slots`, then lets
        each token attend positions 0..its own. `q [T, N, H]`; heads n of group n // (N / K) share
        KV head. `cache` is `(k_pages [P, Z, K, H], v_pages [P, Z, K, Hv])`, or `(k_pages,)` when
        v_new is None: values are then the first `v_dim` elements of the keys (MLA's latent cache).
        With a `window`, a token attends its last `window` positions only, its own among them.
        `sinks [N]` float32 are scores of one more position each head sees, which has no value.
        Softmax in FP32. Returns f32 `[T, N, v_dim]` and the updated cache (same buffers where the
        platform can alias them).
        """
        ...
