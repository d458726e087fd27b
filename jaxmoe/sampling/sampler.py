"""The draw of one token a row, inside the compiled step.

Rows are taken one after the other by the same code, so that a row's draw has the same bits
whatever else is in the batch, and a row pays only for what it asks: greedy is a maximum; a draw is
Gumbel-max (argmax of logits + noise is a draw from their softmax), first among blocks of the
vocabulary and then within one, so that noise is made for a few hundred entries and not for all;
truncation is a search for a threshold. The thresholds are exact and need no sort: bisection over
the float's bits, counting what lies above.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.sampling.inputs import RowInputs
from jaxmoe.sampling_params import MAX_LOGPROBS

BLOCK = 512  # of the vocabulary; about the square root of the largest, so both levels are short
MIN_TEMPERATURE = (
    1e-6  # below it the division overflows; the draw is greedy in all but name long before
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drawn:
    """token_ids `[R]` int32, -1 where a row's logits are not finite (the model is broken or
    overflowed).

    logprobs `[R]` f32 and the likeliest `top_ids`, `top_logprobs` `[R, MAX_LOGPROBS]` are of the
    raw distribution, and zeros for rows that asked for none.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PromptLogprobs:
    """Of T prompt tokens: logprobs `[T]` f32, and the likeliest tokens in their places, `top_ids`
    int32 and `top_logprobs` f32 `[T, MAX_LOGPROBS]`.
    """

    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def prompt_logprobs(logits: jax.Array, targets: jax.Array) -> PromptLogprobs:
    """What `logits [T, V]` f32 say of the tokens that really follow, `targets [T]` int32 (-1: none
    wanted, zeros). Row by row, like `sample`.
    """

    def one(args):
        row, target = args
        return lax.cond(
            target >= 0,
            lambda: PromptLogprobs(*log_probabilities(row, target)),
            lambda: PromptLogprobs(
                jnp.float32(0),
                jnp.zeros(_num_top(row), jnp.int32),
                jnp.zeros(_num_top(row), jnp.float32),
            ),
        )

    return lax.map(one, (logits, targets))


def sample(raw: jax.Array, adjusted: jax.Array, rows: RowInputs) -> Drawn:
    """Draws a token a row from `adjusted [R, V]` f32; log probabilities are taken from `raw [R,
    V]`.
    """

    def one(args):
        raw_row, row, temperature, top_k, top_p, min_p, key, num_logprobs = args
        token = lax.cond(
            temperature == 0.0,
            lambda: argmax(row),
            lambda: draw(row, temperature, top_k, top_p, min_p, key),
        )
        token = jnp.where(jnp.isfinite(jnp.max(row)), token, -1)
        logprob, top_ids, top_logprobs = lax.cond(
            num_logprobs >= 0,
            lambda: log_probabilities(raw_row, token),
            lambda: (
                jnp.float32(0),
                jnp.zeros(_num_top(raw_row), jnp.int32),
                jnp.zeros(_num_top(raw_row), jnp.float32),
            ),
        )
        return Drawn(token, logprob, top_ids, top_logprobs)

    return lax.map(
        one,
        (
            raw,
            adjusted,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            jax.random.key_data(rows.keys()),
            rows.num_logprobs,
        ),
    )


def argmax(row: jax.Array) -> jax.Array:
    """Index of the largest of `[V]`, the first of equals.

    By blocks: maxima vectorize, while XLA:CPU's arg-reduction is a scalar loop (4 times slower at V
    = 150,000).
    """
    if row.shape[0] <= BLOCK:
        return jnp.argmax(row).astype(jnp.int32)
    block = jnp.argmax(_by_block(row, jnp.max))
    start = jnp.minimum(block * BLOCK, row.shape[0] - BLOCK).astype(jnp.int32)
    return start + jnp.argmax(lax.dynamic_slice(row, (start,), (BLOCK,))).astype(jnp.int32)


def _by_block(row: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """`[ceil(V / BLOCK)]`: `reduce` of each block of `[V]`; the last block may be short."""
    whole = row.shape[0] // BLOCK * BLOCK
    blocks = reduce(row[:whole].reshape(-1, BLOCK), axis=1)
    if whole == row.shape[0]:
        return blocks
    return jnp.concatenate([blocks, reduce(row[whole:])[None]])


def draw(
    row: jax.Array,  # [V] f32
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    key_words: jax.Array,  # [2] uint32
) -> jax.Array:
    """One token id from the truncated distribution."""
    scaled = (row - jnp.max(row)) / jnp.maximum(temperature, MIN_TEMPERATURE)
    least = keep_above(scaled, top_k, top_p, min_p)
    kept = jnp.where(scaled >= least, scaled, -jnp.inf)
    key = jax.random.wrap_key_data(key_words, impl="threefry2x32")
    if row.shape[0] <= BLOCK:
        return argmax(kept + jax.random.gumbel(key, kept.shape, jnp.float32))
    masses = jnp.log(_by_block(jnp.exp(kept), jnp.sum))
    noise = jax.random.gumbel(key, (masses.shape[0] + BLOCK,), jnp.float32)
    block = jnp.argmax(masses + noise[BLOCK:])
    start = (block * BLOCK).astype(jnp.int32)
    # The last block is read from an earlier start where it is short; what lies before it does not
    # count.
    at = jnp.minimum(start, row.shape[0] - BLOCK)
    inside = lax.dynamic_slice(kept, (at,), (BLOCK,))
    inside = jnp.where(at + lax.iota(jnp.int32, BLOCK) >= start, inside, -jnp.inf)
    return at + jnp.argmax(inside + noise[:BLOCK]).astype(jnp.int32)


def keep_above(
    scaled: jax.Array,  # [V] f32, largest is 0
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """The logit from which tokens are kept; tokens equal to it all are.

    top_k: the k-th largest. top_p: of what top_k left, the largest value with at least that share
    of the probability at or above it. min_p: that share of the likeliest token's probability.
    """
    codes = _ordered(scaled)
    ones = jnp.ones_like(scaled)
    vocab_size = scaled.shape[0]
    bottom = jnp.int32(_LOWEST)
    by_k = lax.cond(
        (top_k > 0) & (top_k < vocab_size),
        lambda: _largest_code_with(codes, ones, top_k.astype(jnp.float32), bottom),
        lambda: bottom,
    )

    def by_mass():
        mass = jnp.where(codes >= by_k, jnp.exp(scaled), 0.0)
        return _largest_code_with(codes, mass, top_p * jnp.sum(mass), by_k)

    by_p = lax.cond(top_p < 1.0, by_mass, lambda: by_k)
    return jnp.maximum(_value(jnp.maximum(by_k, by_p)), jnp.log(min_p))


_LOWEST = -2139095041  # the ordered code of minus infinity


def _ordered(x: jax.Array) -> jax.Array:
    """int32 codes in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _value(code: jax.Array) -> jax.Array:
    bits = jnp.where(code < 0, code ^ jnp.int32(0x7FFFFFFF), code)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _largest_code_with(
    codes: jax.Array, weights: jax.Array, target: jax.Array, lowest: jax.Array
) -> jax.Array:
    """The largest code c of [lowest, 0] for which the weights of codes >= c sum to at least
    `target`.

    Counts are exact in float32: a vocabulary has fewer than 2**24 tokens.
    """

    def narrow(bounds):
        low, high = bounds
        middle = high - (high - low) // 2
        enough = jnp.sum(jnp.where(codes >= middle, weights, 0.0)) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    return lax.while_loop(lambda b: b[0] < b[1], narrow, (lowest, jnp.int32(0)))[0]


def _num_top(row: jax.Array) -> int:
    return min(MAX_LOGPROBS, row.shape[0])


def log_probabilities(row: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logprob of `token`, and ids and logprobs of the likeliest tokens of `[V]`."""
    log_z = jax.nn.logsumexp(row)
    top, ids = lax.top_k(row, _num_top(row))
    return row[jnp.maximum(token, 0)] - log_z, ids, top - log_z
