"""`NativeOps`: the operations of `Ops` on the CPU kernels.

Interchangeable with `reference.ReferenceOps` behind the `Ops` protocol. Construct one per compiled
program kind: the kernel family is fixed for a program, so that a token's result never depends on
how many others are in its step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import ClampedSwiglu, GatedDeltaConfig
from jaxmoe.ffi import attention
from jaxmoe.ffi import experts as experts_op
from jaxmoe.ffi import gated_delta as gated_delta_op
from jaxmoe.ffi import index_select as index_select_op
from jaxmoe.ffi import linear as linear_op
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.experts import StoreId
from jaxmoe.ffi.linear import Family
from jaxmoe.ffi.ops import GatedDeltaWeights, Point, StepInputs, Weight
from jaxmoe.ffi.sparse import as_pages_of_one, capacity

_POINTS: tuple[Point, ...] = ("begin", "logits", "end")


class NativeOps:
    """Native `Ops`.

    runtime: threads and instruction set.
    store: the routed experts; None for a model (or a test) without them.
    family: "vector" (exact products; F32 activations stay so: decode) or "matrix" (the fastest
        many-row form, BF16 activations: prefill).
    packed: hand a GPU's operands over in one piece, see ffi/experts.py.
    """

    def __init__(
        self, runtime: CpuRuntime, store: StoreId | None, family: Family, *, packed: bool = False
    ):
        if family not in linear_op.FAMILY_CODES:
            raise ValueError(f'family is {family!r}; wanted "vector" or "matrix"')
        self._runtime = runtime
        self._store = store
        self._family: Family = family
        self._packed = packed

    expands_latents = False

    def attend_latents(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the CPU attends latents as they are")

    @property
    def splits_experts(self) -> bool:
        # The experts keep every core busy by themselves, and two operations that share the pool
        # wait for each other's workers: decode of the demo model is three times faster without.
        return False

    def mark(self, x: jax.Array, point: Point) -> jax.Array:
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = jax.ffi.ffi_call("jaxmoe_mark", out, input_output_aliases={0: 0})
        return call(x, runtime_id=np.int64(self._runtime.id), point=np.int64(_POINTS.index(point)))

    def map_rows(self, f: Callable[[Any], Any], x: Any) -> Any:
        """One row after the other, by code for one row: the same bits in a step of any size."""
        return jax.lax.map(f, x)

    def linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        return linear_op.linear(self._runtime, self._family, x, w, out_dtype)

    def head_linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        return linear_op.head_linear(self._runtime, self._family, x, w, out_dtype)

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
        return experts_op.experts(
            self._runtime,
            self._need_store(),
            self._family,
            x,
            expert_ids,
            combine_weights,
            moe_layer_idx,
            activation=activation,
            biases=biases,
        )

    def experts_submit(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *others: jax.Array,
        slot: int = 0,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Starts what `experts` computes; `(ticket, *others)`. See jaxmoe/ffi/experts.py."""
        return experts_op.experts_submit(
            self._runtime,
            self._need_store(),
            self._family,
            x,
            expert_ids,
            combine_weights,
            moe_layer_idx,
            *others,
            slot=slot,
            activation=activation,
            biases=biases,
            packed=self._packed,
        )

    def experts_wait(
        self, ticket: jax.Array, num_tokens: int, hidden: int, *others: jax.Array, slot: int = 0
    ) -> tuple[jax.Array, ...]:
        """Ends what `experts_submit` started; `(y [T, D], *others)`."""
        return experts_op.experts_wait(
            self._runtime, ticket, num_tokens, hidden, *others, slot=slot
        )

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
        selected: jax.Array | None = None,
        num_selected: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        new = (k_new,) if v_new is None else (k_new, v_new)
        cache = tuple(
            attention.kv_write(pages, values, step.kv_slots)
            for pages, values in zip(cache, new, strict=True)
        )

        def attended(cache: tuple[jax.Array, ...], step: StepInputs) -> jax.Array:
            return attention.paged_attention(
                self._runtime,
                q,
                cache,
                step.token_rows,
                step.positions,
                step.block_tables,
                family=self._family,
                scale=scale,
                v_dim=v_dim,
                window=window,
                sinks=sinks,
            )

        if selected is None:
            return attended(cache, step), cache

        def sparse() -> jax.Array:
            return attended(*as_pages_of_one(cache, step, selected, num_selected))

        if num_selected is not None or attention.CHUNK_POSITIONS % cache[0].shape[1]:
            return sparse(), cache
        # Where every position is selected both give the same bits, and tokens of a row share the
        # reading of their keys in one of them only.
        is_dense = jnp.max(step.positions) < selected.shape[1]
        return jax.lax.cond(is_dense, lambda: attended(cache, step), sparse), cache

    def select(
        self,
        q: jax.Array,
        head_weights: jax.Array,
        k_new: jax.Array,
        pages: jax.Array,
        step: StepInputs,
        *,
        top_k: int,
    ) -> tuple[jax.Array | None, jax.Array]:
        pages = attention.kv_write(pages, k_new, step.kv_slots)
        if capacity(step, pages.shape[1]) <= top_k:
            return None, pages
        selected = index_select_op.index_select(
            self._runtime, q, head_weights, pages, step, family=self._family, top_k=top_k
        )
        return selected, pages

    def gated_delta(
        self,
        qkv: jax.Array,
        decay_input: jax.Array,
        rate_input: jax.Array,
        weights: GatedDeltaWeights,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        config: GatedDeltaConfig,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return gated_delta_op.gated_delta(
            self._runtime, qkv, decay_input, rate_input, weights, cache, step, config
        )

    def _need_store(self) -> StoreId:
        if self._store is None:
            raise ValueError("routed experts need a HostStore; this NativeOps was made without one")
        return self._store
