"""The routed experts as FFI calls: in one piece, and as submit and wait.

Weights are not operands: the call names a HostStore by id and a layer by number. Program order is
all the order XLA:CPU keeps, so `experts_submit` and `experts_wait` can carry other arrays through,
aliased: what is computed from them between the two is then really computed between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.linear import FAMILY_CODES, Family
from jaxmoe.ffi.ops import Weight
from jaxmoe.quant.formats import FORMATS


class StoreId(Protocol):
    """What a call needs of a host store."""

    @property
    def id(self) -> int: ...


def _check(op: str, x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array) -> None:
    num_tokens = x.shape[0]
    if x.ndim != 2 or expert_ids.shape != combine_weights.shape or expert_ids.ndim != 2:
        raise ValueError(
            f"{op}: x {x.shape}, expert_ids {expert_ids.shape}, combine_weights "
            f"{combine_weights.shape}; wanted [T, D], [T, A] and [T, A]"
        )
    if expert_ids.shape[0] != num_tokens:
        raise ValueError(f"{op}: x has {num_tokens} tokens, expert_ids {expert_ids.shape[0]}")
    if expert_ids.dtype != jnp.int32 or combine_weights.dtype != jnp.float32:
        raise ValueError(
            f"{op}: expert_ids is {expert_ids.dtype}, combine_weights {combine_weights.dtype}; "
            "wanted int32 and float32"
        )


def _attributes(
    runtime: CpuRuntime, store: StoreId, family: Family, moe_layer_idx: int
) -> dict[str, np.int64]:
    return {
        "runtime_id": np.int64(runtime.id),
        "store_id": np.int64(store.id),
        "layer": np.int64(moe_layer_idx),
        "family": FAMILY_CODES[family],
    }


def _activation(activation: ClampedSwiglu | None) -> dict[str, np.float32]:
    return {
        "alpha": np.float32(activation.alpha if activation else 0.0),
        "limit": np.float32(activation.limit if activation else 0.0),
        "up_offset": np.float32(activation.up_offset if activation else 0.0),
    }


def experts(
    runtime: CpuRuntime,
    store: StoreId,
    family: Family,
    x: jax.Array,
    expert_ids: jax.Array,
    combine_weights: jax.Array,
    moe_layer_idx: int,
    *,
    activation: ClampedSwiglu | None = None,
    biases: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """f32 `[T, D]`: weighted sum of each token's experts; `activation` and `biases` as in `Ops`."""
    _check("experts", x, expert_ids, combine_weights)
    return jax.ffi.ffi_call("jaxmoe_experts", jax.ShapeDtypeStruct(x.shape, jnp.float32))(
        x,
        expert_ids,
        combine_weights,
        *(biases or ()),
        **_activation(activation),
        **_attributes(runtime, store, family, moe_layer_idx),
    )


def experts_group(
    runtime: CpuRuntime,
    family: Family,
    y: jax.Array,
    x: jax.Array,
    expert_ids: jax.Array,
    combine_weights: jax.Array,
    arrays: Sequence[jax.Array],
    first_expert: int,
    *,
    activation: ClampedSwiglu | None = None,
    biases: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """`y` (f32 `[T, D]`) plus the share of X experts from `first_expert` on, in y's buffer.

    Groups in ascending order, the first onto zeros, give the bits of `experts`.

    arrays: gate and up `[X, F, D]`, down `[X, D, F]`, and their scales where the format has some,
        as `slot_ring.expert_buffers` says. They are read when the call runs: nothing is kept.
    biases: of gate and up, f32 `[X, F]`.
    """
    _check("experts_group", x, expert_ids, combine_weights)
    if len(arrays) not in (3, 6):
        raise ValueError(
            f"experts_group: {len(arrays)} arrays of weights and scales; wanted 3 or 6"
        )
    weights = Weight(arrays[0], arrays[3] if len(arrays) == 6 else None)
    call = jax.ffi.ffi_call(
        "jaxmoe_experts_group",
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        input_output_aliases={0: 0},
    )
    return call(
        y,
        x,
        expert_ids,
        combine_weights,
        *arrays,
        *(biases or ()),
        runtime_id=np.int64(runtime.id),
        first_expert=np.int64(first_expert),
        family=FAMILY_CODES[family],
        format=np.int64(FORMATS[weights.format].code),
        has_biases=biases is not None,
        **_activation(activation),
    )


def experts_submit(
    runtime: CpuRuntime,
    store: StoreId,
    family: Family,
    x: jax.Array,
    expert_ids: jax.Array,
    combine_weights: jax.Array,
    moe_layer_idx: int,
    *others: jax.Array,
    slot: int = 0,
    activation: ClampedSwiglu | None = None,
    biases: tuple[jax.Array, jax.Array] | None = None,
    packed: bool = False,
) -> tuple[jax.Array, ...]:
    """Starts the experts; returns `(ticket, *others)`: int32 `[1]` and the same buffers.

    slot: of calls that are outstanding at once in a program, each has its own; 0 to 7. The wait
        names the same one.
    packed: joins the three operands into one first: a GPU copies one piece to the host instead of
        three.
    """
    _check("experts_submit", x, expert_ids, combine_weights)
    bias_arrays = biases or ()
    attributes = _activation(activation) | _attributes(runtime, store, family, moe_layer_idx)
    target, operands = "jaxmoe_experts_submit", [x, expert_ids, combine_weights]
    if packed:
        target, operands = f"{target}_packed", [_pack(x, expert_ids, combine_weights)]
        attributes |= {
            "num_tokens": np.int64(x.shape[0]),
            "per_token": np.int64(expert_ids.shape[1]),
            "x_is_bf16": x.dtype == jnp.bfloat16,
        }
    operands += bias_arrays
    results = (
        jax.ShapeDtypeStruct((1,), jnp.int32),
        *(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in others),
    )
    # Two equal submits are two tickets, and a ticket nobody uses must still be waited for.
    call = jax.ffi.ffi_call(
        target,
        results,
        input_output_aliases={len(operands) + i: 1 + i for i in range(len(others))},
        has_side_effect=True,
    )
    attributes |= {"has_biases": bool(bias_arrays), "slot": np.int64(slot)}
    return tuple(call(*operands, *others, **attributes))


def _pack(x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array) -> jax.Array:
    """All three as int32 words, one after the other."""
    if x.dtype == jnp.bfloat16 and x.shape[1] % 2:
        raise ValueError(f"packed: x is {x.shape} bfloat16; wanted an even number of columns")
    if x.dtype == jnp.bfloat16:
        x = x.reshape(x.shape[0], -1, 2)
    words = [
        jax.lax.bitcast_convert_type(a, jnp.int32).reshape(-1)
        for a in (x, expert_ids, combine_weights)
    ]
    return jnp.concatenate(words)


def experts_wait(
    runtime: CpuRuntime,
    ticket: jax.Array,
    num_tokens: int,
    hidden: int,
    *others: jax.Array,
    slot: int = 0,
) -> tuple[jax.Array, ...]:
    """Finishes the experts of a ticket; returns `(y, *others)`: f32 `[T, D]` and the same buffers.

    A ticket is good for one wait.
    """
    results = (
        jax.ShapeDtypeStruct((num_tokens, hidden), jnp.float32),
        *(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in others),
    )
    call = jax.ffi.ffi_call(
        "jaxmoe_experts_wait",
        results,
        input_output_aliases={1 + i: 1 + i for i in range(len(others))},
        has_side_effect=True,
    )
    attributes = {"runtime_id": np.int64(runtime.id), "slot": np.int64(slot)}
    return tuple(call(ticket, *others, **attributes))
