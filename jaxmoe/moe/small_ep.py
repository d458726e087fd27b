"""Expert parallelism over the R devices of a host: SmallEP, and the standard all-to-all beside it.

Both take what the experts need of a rank's own tokens, hand some tokens to where the experts are,
and bring the weighted sums back; what computes the rank's experts comes in between and knows
neither. All of it runs inside `shard_map`, and every collective is either in `send` or in `back`:
a rank whose weights could not be loaded must not leave the others waiting in one.

SmallEP (paper section 3.2) gathers all tokens, unsorted, on all ranks; each computes its experts'
partial sums, and one reduce-scatter adds them up. Nothing is sorted or padded, and with few ranks
it moves less than one copy of a token for each of its A experts. The gate runs where the token is,
since it reads the residual stream unrounded: beside a token's D values go its A ids and weights.

`AllToAll` is what large clusters do: one copy of a token for every expert that it chose, sorted by
the expert's rank, there and back. It is here to be compared with.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.common.collectives import send_bits


def expert_share(num_experts: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(first, count) of a rank's experts: all ranks have as many, but for one."""
    least, more = divmod(num_experts, num_ranks)
    return rank * least + min(rank, more), least + (rank < more)


def most_experts(num_experts: int, num_ranks: int) -> int:
    """Of any rank."""
    return -(-num_experts // num_ranks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sent:
    """What a rank's experts compute: `x [S, D]`, expert_ids `[S, A']` of the rank's own experts,
    counted from its first, -1 for others', and float32 combine_weights `[S, A']`.

    kept: what `back` wants to know.
    """

    x: jax.Array
    expert_ids: jax.Array
    combine_weights: jax.Array
    kept: Any = None


class Exchange(Protocol):
    """Both halves run inside `shard_map`."""

    def send(self, x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array) -> Sent:
        """Of a rank's own `x [T, D]`, `expert_ids [T, A]` (-1: none), `combine_weights [T, A]`."""
        ...

    def back(self, y: jax.Array, kept: Any) -> jax.Array:
        """Float32 `y [S, D]`, a rank's weighted sums, to all ranks' sums of its own `[T, D]`."""
        ...

    def first_expert(self) -> jax.Array:
        """Number of the rank's first expert, int32."""
        ...


@dataclasses.dataclass(frozen=True)
class _OverRanks:
    """axis: the mesh's, of `num_ranks`. num_experts: of a layer, on all ranks together."""

    axis: str
    num_ranks: int
    num_experts: int

    def first_expert(self) -> jax.Array:
        return self._first(jax.lax.axis_index(self.axis))

    def _first(self, rank: jax.Array) -> jax.Array:
        least, more = divmod(self.num_experts, self.num_ranks)
        return rank * least + jnp.minimum(rank, more)

    def _local(self, expert_ids: jax.Array) -> jax.Array:
        """Ids counted from the rank's first expert, -1 for those it does not have."""
        rank = jax.lax.axis_index(self.axis)
        first, end = self._first(rank), self._first(rank + 1)
        mine = (expert_ids >= first) & (expert_ids < end)
        return jnp.where(mine, expert_ids - first, -1)


@dataclasses.dataclass(frozen=True)
class SmallEp(_OverRanks):
    """`Exchange` by one all-gather of tokens and one reduce-scatter of sums."""

    def send(self, x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array) -> Sent:
        x, ids, weights = (
            send_bits(lambda a: jax.lax.all_gather(a, self.axis, tiled=True), a)
            for a in (x, expert_ids, combine_weights.astype(jnp.float32))
        )
        return Sent(x, self._local(ids), weights)

    def back(self, y: jax.Array, kept: Any) -> jax.Array:
        return jax.lax.psum_scatter(y, self.axis, scatter_dimension=0, tiled=True)


@dataclasses.dataclass(frozen=True)
class AllToAll(_OverRanks):
    """`Exchange` by an all-to-all of (token, expert) pairs and another of their results.

    capacity: pairs that one rank may send to one other. None: all of its own, the only number that
    no routing exceeds; programs have fixed shapes. With fewer, pairs beyond are lost: to count
    bytes, not to compute with.
    """

    capacity: int | None = None

    def send(self, x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array) -> Sent:
        num_tokens, per_token = expert_ids.shape
        capacity = self._capacity(num_tokens, per_token)
        ids = expert_ids.reshape(-1)
        firsts = self._first(jnp.arange(1, self.num_ranks + 1))
        to = jnp.where(ids < 0, self.num_ranks, jnp.searchsorted(firsts, ids, side="right"))
        # A pair's place among those to the same rank, in order of tokens.
        chosen = to[:, None] == jnp.arange(self.num_ranks)  # [T A, R]
        place = jnp.take_along_axis(
            jnp.cumsum(chosen, axis=0) - 1, jnp.minimum(to, self.num_ranks - 1)[:, None], axis=1
        )[:, 0]
        fits = (to < self.num_ranks) & (place < capacity)
        at = jnp.where(fits, to * capacity + place, self.num_ranks * capacity)

        def sent(rows: jax.Array, empty: Any) -> jax.Array:
            buffer = jnp.full((self.num_ranks * capacity, *rows.shape[1:]), empty, rows.dtype)
            buffer = buffer.at[at].set(rows, mode="drop")
            return send_bits(lambda a: jax.lax.all_to_all(a, self.axis, 0, 0, tiled=True), buffer)

        token = jnp.repeat(jnp.arange(num_tokens), per_token)
        weights = combine_weights.astype(jnp.float32).reshape(-1, 1)
        local = self._local(sent(ids[:, None].astype(jnp.int32), -1))
        places = jnp.where(fits, at, -1).reshape(num_tokens, per_token)
        return Sent(sent(x[token], 0), local, sent(weights, 0), places)

    def back(self, y: jax.Array, kept: Any) -> jax.Array:
        y = jax.lax.all_to_all(y, self.axis, 0, 0, tiled=True)
        total = jnp.zeros((kept.shape[0], y.shape[1]), jnp.float32)
        for at in kept.T:  # one of each token's experts after the other
            total += jnp.where((at >= 0)[:, None], y[jnp.maximum(at, 0)], 0.0)
        return total

    def _capacity(self, num_tokens: int, per_token: int) -> int:
        return self.capacity or num_tokens * min(
            per_token, most_experts(self.num_experts, self.num_ranks)
        )
