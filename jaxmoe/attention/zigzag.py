"""Causal attention of one prompt over R devices: zig-zag context parallelism with a ring of keys.

The prompt is cut into 2R chunks of equal length; rank r has chunks r and 2R-1-r, so that every rank
has as many (query, key) pairs as any other (arXiv 2309.14509 calls it striping; the zig-zag is that
of the paper's section 3.2). Keys and values (MLA: latents, a few hundred values a token) go round
the ranks by ppermute; queries stay. Each visit is attended to by itself and joined to what came
before by the online softmax. A prefix that is cached already takes part as one more piece, 1/R of
it on every rank.

Positions within a visiting piece are counted from its first key: a query before it sees nothing of
it, one behind it sees all, and only a query inside it meets the diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.common.collectives import send_bits
from jaxmoe.ffi.ops import Ops, StepInputs, Weight
from jaxmoe.kernels.partial_attention import Part

_MASKED = -1e30  # of a softmax over nothing; not -inf: the difference of two must be a number
# Keys of a step of `ArrayParts`: the scores of all queries with them are its largest temporary.
_BLOCK = 128
_HIGHEST = jax.lax.Precision.HIGHEST

Arrays = tuple[jax.Array, ...]


def chunk_length(num_tokens: int, num_ranks: int) -> int:
    """Tokens of each of the 2R chunks; the last ones may be shorter, or empty."""
    return -(-num_tokens // (2 * num_ranks))


def deal(num_tokens: int, num_ranks: int, rows: int) -> np.ndarray:
    """Which token each row of each rank holds: int32 `[R, rows]`, -1 for none."""
    length = chunk_length(num_tokens, num_ranks)
    assert 2 * length <= rows, (num_tokens, num_ranks, rows)
    out = np.full((num_ranks, rows), -1, np.int32)
    for rank in range(num_ranks):
        for at, chunk in enumerate((rank, 2 * num_ranks - 1 - rank)):
            tokens = np.arange(chunk * length, (chunk + 1) * length, dtype=np.int32)
            out[rank, at * length : (at + 1) * length] = np.where(tokens < num_tokens, tokens, -1)
    return out


class Parts(Protocol):
    """How queries attend one piece of keys: `ArrayParts` on any platform,
    `kernels.partial_attention.DeviceParts` on a GPU.

    positions: int32 `[T]` of the queries, counted from the piece's first key; a negative one sees
    nothing. count: int32 scalar, keys of the piece that are there.
    """

    def keys(
        self,
        q: jax.Array,
        keys: jax.Array,
        values: jax.Array | None,
        positions: jax.Array,
        count: jax.Array,
        *,
        scale: float,
        v_dim: int,
        window: int | None,
    ) -> Part:
        """`q [T, N, H]` over `keys [S, K, H]` and `values [S, K, v_dim]`, by default the keys'
        first elements.
        """
        ...

    def latents(
        self,
        q: jax.Array,
        latents: jax.Array,
        positions: jax.Array,
        count: jax.Array,
        *,
        w_uk: Weight,
        w_uv: Weight,
        scale: float,
    ) -> Part:
        """`q [T, N, nope + rope]` over keys and values expanded from `latents [S, C + rope]`."""
        ...


class ArrayParts:
    """In jnp, block by block of keys with a running softmax: memory does not grow with the keys."""

    def keys(
        self,
        q: jax.Array,
        keys: jax.Array,
        values: jax.Array | None,
        positions: jax.Array,
        count: jax.Array,
        *,
        scale: float,
        v_dim: int,
        window: int | None,
    ) -> Part:
        num_tokens, num_heads, head_dim = q.shape
        kv_heads = keys.shape[1]
        grouped = q.astype(jnp.float32).reshape(num_tokens, kv_heads, -1, head_dim)
        block = min(_BLOCK, keys.shape[0])
        keys = _whole_blocks(keys, block)
        values = keys[..., :v_dim] if values is None else _whole_blocks(values, block)
        count = jnp.minimum(count, jnp.max(positions) + 1)

        def step(i: jax.Array, state: Any) -> Any:
            out, top, total = state
            begin = i * block
            k = jax.lax.dynamic_slice_in_dim(keys, begin, block).astype(jnp.float32)
            v = jax.lax.dynamic_slice_in_dim(values, begin, block).astype(jnp.float32)
            at = begin + jnp.arange(block)
            seen = (at <= positions[:, None]) & (at < count)
            if window is not None:
                seen &= at > positions[:, None] - window
            seen = seen[:, None, None]
            scores = jnp.einsum("tkgh,skh->tkgs", grouped, k, precision=_HIGHEST) * scale
            scores = jnp.where(seen, scores, _MASKED)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            decay = jnp.exp(top - new_top)
            out = out * decay[..., None]
            out += jnp.einsum("tkgs,skv->tkgv", weights, v, precision=_HIGHEST)
            return out, new_top, total * decay + weights.sum(axis=-1)

        heads = grouped.shape[:3]
        zeros = jnp.zeros(heads, jnp.float32)
        start = jnp.zeros((*heads, v_dim), jnp.float32), zeros + _MASKED, zeros
        blocks = jnp.maximum(-(-count // block), 0)
        out, top, total = jax.lax.fori_loop(0, blocks, step, start)
        least = jnp.maximum(total, 1e-30)
        lse = jnp.where(total > 0, top + jnp.log(least), _MASKED)
        out = out / least[..., None]
        return Part(out.reshape(num_tokens, num_heads, v_dim), lse.reshape(num_tokens, num_heads))

    def latents(self, *args: Any, **options: Any) -> Part:
        raise NotImplementedError("the CPU attends latents as they are")


def _whole_blocks(array: jax.Array, block: int) -> jax.Array:
    return jnp.pad(array, ((0, -array.shape[0] % block), (0, 0), (0, 0)))


def join(a: Part, b: Part) -> Part:
    """Of two parts over different keys, the one over both."""
    lse = jnp.logaddexp(a.lse, b.lse)
    out = jnp.zeros_like(a.out)
    for part in (a, b):
        share = jnp.where(part.lse <= _MASKED, 0.0, jnp.exp(part.lse - lse))[..., None]
        out += jnp.where(share > 0, part.out, 0.0) * share
    return Part(out, jnp.where((a.lse <= _MASKED) & (b.lse <= _MASKED), _MASKED, lse))


def _with_sinks(part: Part, sinks: jax.Array | None) -> jax.Array:
    """`sinks [N]`: scores of one more position each head sees, which has no value."""
    if sinks is None:
        return part.out
    return part.out * jnp.exp(part.lse - jnp.logaddexp(part.lse, sinks))[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Held:
    """What a rank brings to the ring, arrays `[S, K, H]` of keys, and values where they are apart.

    new: of its own tokens, rows as `deal` has them. prefix: its share of what is cached, rows in
    order of positions; () where nothing is.
    """

    new: Arrays
    prefix: Arrays = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cut:
    """How the prompt lies on the ranks, int32 scalars. start: position of its first new token, so
    many are cached. num_tokens: new ones. length: of a chunk.
    """

    start: jax.Array
    num_tokens: jax.Array
    length: jax.Array


class KeysOps:
    """The operations of `ops`, but for attention, whose new keys (and values) are put aside.

    Good for one trace of one layer. taken: `(k_new [T, K, H],)`, or with `v_new`.
    """

    def __init__(self, ops: Ops):
        self._ops = ops
        self.taken: Arrays = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: Arrays,
        step: StepInputs,
        *,
        v_dim: int,
        **options: Any,
    ) -> tuple[jax.Array, Arrays]:
        self.taken = (k_new,) if v_new is None else (k_new, v_new)
        return jnp.zeros((*q.shape[:2], v_dim), jnp.float32), cache

    def attend_latents(
        self,
        q: jax.Array,
        k_new: jax.Array,
        cache: Arrays,
        step: StepInputs,
        *,
        w_uv: Weight,
        **options: Any,
    ) -> tuple[jax.Array, Arrays]:
        self.taken = (k_new,)
        return jnp.zeros((*q.shape[:2], w_uv.data.shape[1]), jnp.float32), cache


class RingOps:
    """The operations of `ops` inside `shard_map`, but for attention, which goes round the ring.

    The tokens of a step are any of the rank's own; their keys are in `held` already. Caches are not
    looked at. parts: how one piece is attended. axis: name of the mesh's axis of `num_ranks`.
    """

    def __init__(self, ops: Ops, parts: Parts, held: Held, cut: Cut, axis: str, num_ranks: int):
        self._ops, self._parts, self._held, self._cut = ops, parts, held, cut
        self._axis, self._ranks = axis, num_ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: Arrays,
        step: StepInputs,
        *,
        scale: float,
        v_dim: int,
        window: int | None = None,
        sinks: jax.Array | None = None,
        selected: jax.Array | None = None,
        num_selected: jax.Array | None = None,
    ) -> tuple[jax.Array, Arrays]:
        assert selected is None and num_selected is None, (
            "positions are chosen among all keys, the ring brings some"
        )

        def attend(piece: Arrays, positions: jax.Array, count: jax.Array) -> Part:
            keys, values = piece[0], piece[1] if len(piece) > 1 else None
            return self._parts.keys(
                q, keys, values, positions, count, scale=scale, v_dim=v_dim, window=window
            )

        return _with_sinks(self._ring(attend, step), sinks), cache

    def attend_latents(
        self,
        q: jax.Array,
        k_new: jax.Array,
        cache: Arrays,
        step: StepInputs,
        *,
        w_uk: Weight,
        w_uv: Weight,
        scale: float,
    ) -> tuple[jax.Array, Arrays]:
        def attend(piece: Arrays, positions: jax.Array, count: jax.Array) -> Part:
            return self._parts.latents(
                q, piece[0][:, 0], positions, count, w_uk=w_uk, w_uv=w_uv, scale=scale
            )

        return self._ring(attend, step).out, cache

    def _ring(
        self, attend: Callable[[Arrays, jax.Array, jax.Array], Part], step: StepInputs
    ) -> Part:
        rank = jax.lax.axis_index(self._axis)
        onward = [(r, (r + 1) % self._ranks) for r in range(self._ranks)]
        held, found = self._held, None
        for turn in range(self._ranks):
            owner = (rank - turn) % self._ranks
            visiting = held
            if turn + 1 < self._ranks:  # on its way while this one is attended to
                held = jax.tree.map(
                    lambda array: send_bits(
                        lambda a: jax.lax.ppermute(a, self._axis, onward), array
                    ),
                    visiting,
                )
            for piece, begin, count in self._pieces(visiting, owner):
                # Padding is before everything.
                positions = jnp.where(step.token_rows < 0, -1, step.positions - begin)
                part = attend(piece, positions, count)
                found = part if found is None else join(found, part)
        assert found is not None
        return Part(jnp.where(step.token_rows[:, None, None] < 0, 0.0, found.out), found.lse)

    def _pieces(
        self, held: Held, owner: jax.Array
    ) -> Iterator[tuple[Arrays, jax.Array, jax.Array]]:
        """(rows, position of the first, how many are there) of what `owner` brought."""
        cut = self._cut
        if held.prefix:
            share = held.prefix[0].shape[0]
            begin = owner * share
            yield held.prefix, begin, jnp.clip(cut.start - begin, 0, share)
        half = held.new[0].shape[0] // 2
        for row, chunk in ((0, owner), (cut.length, 2 * self._ranks - 1 - owner)):
            first = chunk * cut.length
            rows = tuple(jax.lax.dynamic_slice_in_dim(a, row, half) for a in held.new)
            yield rows, cut.start + first, jnp.clip(cut.num_tokens - first, 0, cut.length)
