"""The training loop: AdamW on next tokens, routers balanced by their correction bias.

Balancing is DeepSeek-V3's, without an auxiliary loss (arXiv 2412.19437, section 2.1.2): after each
step an expert that got more than its share of tokens has its bias lowered by a fixed amount, one
that got less has it raised. The bias decides only who is chosen, so the loss sees none of it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demo.dataset import Batches, Dataset
from demo.evaluate import heldout_nll
from demo.model import Params, TrainableDecoder
from jaxmoe.config.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Flags of tools/train_demo.py, under the same names.

    long_length: the last `long_share` of the steps read sequences of this length, as many tokens.
    heldout_batches: read at most so many batches of each work's held-out text (to try things out).
    """

    steps: int = 4000
    minutes: float = math.inf
    tokens_per_step: int = 16384
    length: int = 1024
    long_length: int = 2048
    long_share: float = 0.2
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.15
    bias_rate: float = 2e-3
    chats_per_epoch: int = 8000
    eval_every: int = 200
    heldout_batches: int = 1000
    seed: int = 0


def learning_rate_at(step: int, steps: int, options: TrainingOptions) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return options.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _make_step(
    model: TrainableDecoder, options: TrainingOptions
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    decays = {k: kind in ("matrix", "head_map", "embedding") for k, kind in model.kinds.items()}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(options.weight_decay, mask=decays),
    )

    def loss_of(
        params: Params, tokens: jax.Array, learn: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        keys = iter(jax.random.split(key, 2 * model.config.num_layers + 1))

        def dropout(x: jax.Array) -> jax.Array:
            kept = jax.random.bernoulli(next(keys), 1 - options.dropout, x.shape)
            return jnp.where(kept, x / (1 - options.dropout), 0.0)

        logits, loads = model(params, tokens[:, :-1], dropout=dropout)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * learn) / jnp.maximum(learn.sum(), 1), loads

    def step(params, state, tokens, learn, seed, rate, bias_rate):
        key = jax.random.key(seed)
        (loss, loads), grads = jax.value_and_grad(loss_of, has_aux=True)(params, tokens, learn, key)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        for name, load in zip(model.router_biases, loads, strict=True):
            params[name] += bias_rate * jnp.sign(load.mean() - load)
        overload = (loads.max(1) / loads.mean(1)).max()
        return params, state, loss, overload

    return jax.jit(step, donate_argnums=(0, 1)), optimizer


class _Pace:
    """Cuts the number of steps to what fits into `minutes`, once the speed is known."""

    _FROM, _TO = 20, 70

    def __init__(self, options: TrainingOptions):
        self._options = options
        self.steps = options.steps
        self._started = self._marked = time.monotonic()
        self._compiled_s = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def after_step(self, i: int, loss: jax.Array) -> None:
        if math.isinf(self._options.minutes) or i not in (0, self._FROM, self._TO):
            return
        loss.block_until_ready()
        now = time.monotonic()
        if i == 0:
            self._compiled_s = now - self._started
        elif i == self._TO:
            step_s = (now - self._marked) / (self._TO - self._FROM)
            # The long sequences are compiled once more, and are slower.
            left_s = self._options.minutes * 60 - self.seconds - self._compiled_s
            self.steps = min(self.steps, i + max(1, int(left_s / (1.2 * step_s))))
            print(f"{1 / step_s:.1f} steps/s; repeat this run with --steps={self.steps}")
        self._marked = now


def train(
    config: ModelConfig, dataset: Dataset, options: TrainingOptions
) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Trains and returns the float32 weights that read the held-out text best, and the history.

    Where `minutes` would be exceeded, the number of steps is cut to what fits, once, after the
    speed has been measured; the printed `--steps` then repeats the run anywhere.
    """
    model = TrainableDecoder(config, jnp.bfloat16)
    params = model.init(options.seed)
    run_step, optimizer = _make_step(model, options)
    state = jax.jit(optimizer.init)(params)
    batches = Batches(dataset, options.chats_per_epoch, options.seed)
    num_params = sum(p.size for p in params.values())
    print(f"{num_params / 1e6:.2f} M parameters, {batches.tokens_per_epoch} tokens an epoch")

    pace = _Pace(options)
    history, best, best_nll, i, num_tokens = [], params, math.inf, 0, 0
    while i < pace.steps:
        is_long = i >= pace.steps * (1 - options.long_share)
        length = options.long_length if is_long else options.length
        tokens, learn = batches.next(max(1, options.tokens_per_step // length), length)
        rate = learning_rate_at(i, pace.steps, options)
        # At rest before the end, so that the weights settle on the routing they will meet.
        bias_rate = options.bias_rate if i < 0.9 * pace.steps else 0.0
        params, state, loss, overload = run_step(params, state, tokens, learn, i, rate, bias_rate)
        pace.after_step(i, loss)
        i, num_tokens = i + 1, num_tokens + learn.size
        if i % options.eval_every == 0 or i == pace.steps:
            nll = heldout_nll(model, params, dataset, options.heldout_batches)
            if nll < best_nll:
                best, best_nll = jax.tree.map(jnp.copy, params), nll
            entry = {
                "step": i,
                "epoch": num_tokens / batches.tokens_per_epoch,
                "loss": float(loss),
                "heldout_perplexity": math.exp(nll),
                "fullest_expert": float(overload),
                "steps_per_s": i / pace.seconds,
            }
            history.append(entry)
            print(", ".join(f"{key} {value:.5g}" for key, value in entry.items()), flush=True)
    return {name: np.asarray(value) for name, value in best.items()}, history
