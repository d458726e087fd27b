"""What the README states: held-out perplexity and samples, through the project's decoder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from demo.dataset import Dataset, windows
from demo.model import TrainableDecoder

_WINDOW = 1024
_PER_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Reading:
    """How well text is predicted: the sum of -ln p over the predictions of `num_tokens` tokens."""

    nll: float
    num_tokens: int
    num_bytes: int

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.num_tokens

    def summary(self) -> dict[str, float]:
        return {
            "perplexity_per_token": round(math.exp(self.nll_per_token), 3),
            "bits_per_byte": round(self.nll / math.log(2) / self.num_bytes, 4),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
        }


@functools.partial(jax.jit, static_argnums=(0, 4))
def _nll(
    model: TrainableDecoder,
    params: Mapping[str, jax.Array],
    tokens: jax.Array,
    counted: jax.Array,
    precision: jax.lax.Precision,
) -> jax.Array:
    logits, _ = model(params, tokens[:, :-1], precision=precision)
    log_p = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(taken * counted)


def heldout_readings(
    model: TrainableDecoder,
    params: Mapping[str, jax.Array],
    dataset: Dataset,
    max_batches: int,
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
) -> dict[str, Reading]:
    """Each work's held-out documents, end to end, in windows of 1024 tokens without overlap."""
    readings = {}
    for source, stream in dataset.heldout.items():
        nll, num_tokens = 0.0, 0
        batches = windows(stream, _WINDOW, _PER_BATCH)
        for tokens, counted in itertools.islice(batches, max_batches):
            nll += float(_nll(model, params, tokens, counted, precision))
            num_tokens += int(counted.sum())
        readings[source] = Reading(nll, num_tokens, dataset.heldout_bytes[source])
    return readings


def total(readings: Mapping[str, Reading]) -> Reading:
    fields = [dataclasses.astuple(reading) for reading in readings.values()]
    return Reading(*(sum(column) for column in zip(*fields, strict=True)))


def heldout_nll(
    model: TrainableDecoder, params: Mapping[str, jax.Array], dataset: Dataset, max_batches: int
) -> float:
    """Mean -ln p over all held-out predictions."""
    return total(heldout_readings(model, params, dataset, max_batches)).nll_per_token


def document_nll(
    model: TrainableDecoder, params: Mapping[str, jax.Array], tokens: Sequence[int]
) -> float:
    """Mean -ln p of a document's tokens after the first, in float32 at the highest precision."""
    row = np.asarray(tokens, np.int32)[None]
    counted = np.ones((1, len(tokens) - 1), bool)
    return float(_nll(model, params, row, counted, jax.lax.Precision.HIGHEST)) / (len(tokens) - 1)


def sample(
    model: TrainableDecoder,
    params: Mapping[str, jax.Array],
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    temperature: float,
    eos: int,
    seed: int = 0,
) -> list[list[int]]:
    """Continues prompts, recomputing the whole text for every token: slow and simple."""
    longest = max(len(prompt) for prompt in prompts) + num_tokens
    tokens = np.full((len(prompts), longest), eos, np.int32)
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def next_tokens(params, tokens, lengths, key):
        logits, _ = model(params, tokens)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
        if temperature == 0.0:
            return last.argmax(-1)
        return jax.random.categorical(key, last / temperature)

    done = np.zeros(len(prompts), bool)
    for i in range(num_tokens):
        new = np.asarray(next_tokens(params, tokens, lengths, jax.random.key(seed + i)))
        done |= new == eos
        tokens[~done, lengths[~done]] = new[~done]
        lengths = lengths + ~done
    return [
        row[len(prompt) : length].tolist()
        for row, prompt, length in zip(tokens, prompts, lengths, strict=True)
    ]
