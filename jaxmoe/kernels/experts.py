"""Routed experts on the device that holds (some of) their weights: tokens sorted by expert, two
grouped products, a weighted sum.

Experts come in groups, as the ring of stream-loading prefill delivers them (paper section 3.1);
each group adds its share to the tokens' sums. Groups in ascending order, and experts ascending
within a token, fix the order of every addition. Dropless: rows are processed in windows of a fixed
number, as many as there are.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.reference import activate
from jaxmoe.kernels.combine import add_expert_rows
from jaxmoe.kernels.grouped_matmul import (
    PREFILL_PAIR_TILING,
    PREFILL_TILING,
    grouped_matmul,
    narrowed,
    tiles_of,
)

# Rows computed at a time. Their float32 results are the largest temporary: 470 MB at D = 7168;
# fewer would read the weights of experts that straddle windows more often.
WINDOW_ROWS = 16384


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Routing:
    """The (token, expert) pairs of a step in ascending order of expert.

    token: `[P + window]` whose row a pair uses, padded. offsets: `[E + 1]` first pair of each
    expert. places: `[T, A]` number of a token's pairs, experts ascending, -1 for padding.
    combine_weights: float32 `[T, A]` in the same order.
    """

    token: jax.Array
    offsets: jax.Array
    places: jax.Array
    combine_weights: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ExpertGroup:
    """Weights of consecutive experts on the device: gate and up `[X, F, D]`, down `[X, D, F]`, and
    for FP8 their float32 block scales, else None.
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_scale: jax.Array | None = None
    up_scale: jax.Array | None = None
    down_scale: jax.Array | None = None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The weights, and the scales where there are some."""
        weights = self.gate, self.up, self.down
        if self.gate_scale is None or self.up_scale is None or self.down_scale is None:
            return weights
        return *weights, self.gate_scale, self.up_scale, self.down_scale


def sort_by_expert(
    expert_ids: jax.Array, combine_weights: jax.Array, num_experts: int, window: int = WINDOW_ROWS
) -> Routing:
    """`expert_ids [T, A]` int32, -1 for none, to the order the products are computed in."""
    num_tokens, per_token = expert_ids.shape
    ids = jnp.where(expert_ids < 0, num_experts, expert_ids).astype(jnp.int32)
    by_id = jnp.argsort(ids, axis=1, stable=True)
    ids = jnp.take_along_axis(ids, by_id, axis=1)
    weights = jnp.take_along_axis(combine_weights.astype(jnp.float32), by_id, axis=1)
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    number = jnp.arange(flat.shape[0], dtype=jnp.int32)
    places = jnp.zeros_like(order).at[order].set(number).reshape(ids.shape)
    offsets = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1)).astype(jnp.int32)
    token = jnp.pad(order // per_token, (0, window))
    return Routing(token, offsets, jnp.where(ids < num_experts, places, -1), weights)


def add_group(
    y: jax.Array,
    x: jax.Array,
    routing: Routing,
    group: ExpertGroup,
    first_expert: int,
    *,
    activation: ClampedSwiglu | None = None,
    biases: tuple[jax.Array, jax.Array] | None = None,
    window: int = WINDOW_ROWS,
    interpret: bool = False,
) -> jax.Array:
    """`y [T, D]` float32 plus the shares of experts `first_expert ..` that `group` holds.

    Args:
        x: `[T, D]` the experts' input.
        biases: float32 `[X, F]` of the group's gates and ups.
        window: as for `sort_by_expert`.
    """
    num_here = group.gate.shape[0]
    offsets = jax.lax.slice_in_dim(routing.offsets, first_expert, first_expert + num_here + 1)
    group_end = offsets[-1]
    pair = None
    if group.gate_scale is not None and group.up_scale is not None:
        pair = group.gate_scale, group.up_scale

    def act(gate, up, *bias):
        if bias:
            gate, up = gate + bias[0], up + bias[1]
        return activate(gate, up, activation)

    pair_tiling = narrowed(PREFILL_PAIR_TILING, x.dtype)
    tiling = dataclasses.replace(narrowed(PREFILL_TILING, x.dtype), rows=pair_tiling.rows)

    def one_window(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin, y = state
        tokens = jax.lax.dynamic_slice_in_dim(routing.token, begin, window)
        rows = x[tokens]
        here = jnp.clip(offsets - begin, 0, window)
        tiles = tiles_of(here[:-1], here[1:], window, tiling.rows)
        hidden = grouped_matmul(
            rows,
            (group.gate, group.up),
            pair,
            tiles,
            combine=act,
            columns=biases or (),
            out_dtype=x.dtype,
            tiling=pair_tiling,
            interpret=interpret,
        )
        out = grouped_matmul(
            hidden,
            (group.down,),
            None if group.down_scale is None else (group.down_scale,),
            tiles,
            tiling=tiling,
            interpret=interpret,
        )
        span = jnp.stack([begin, jnp.minimum(begin + window, group_end)])
        weights = routing.combine_weights
        y = add_expert_rows(y, out, routing.places, weights, span, interpret=interpret)
        return begin + window, y

    _, y = jax.lax.while_loop(lambda s: s[0] < group_end, one_window, (offsets[0], y))
    return y


@dataclasses.dataclass(frozen=True)
class DeviceGroups:
    """`moe.experts_streamed.GroupExperts` by these kernels.

    window: rows computed at a time. interpret: as ordinary jax, on any platform.
    """

    window: int = WINDOW_ROWS
    interpret: bool = False

    def route(self, expert_ids: jax.Array, combine_weights: jax.Array, num_experts: int) -> Routing:
        return sort_by_expert(expert_ids, combine_weights, num_experts, self.window)

    def add(
        self,
        y: jax.Array,
        x: jax.Array,
        routing: Routing,
        group: ExpertGroup,
        first_expert: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        return add_group(
            y,
            x,
            routing,
            group,
            first_expert,
            activation=activation,
            biases=biases,
            window=self.window,
            interpret=self.interpret,
        )
