"""jaxmoe_bench decode and prefill: whole steps of a model, and the attention of a prompt's chunk.

The bytes and operations of a figure are those that the operations themselves counted: weights and
cache that had to be read, products that were asked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.cli.bench_machine import Work
from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import CompressedConfig, MlaConfig, ModelConfig
from jaxmoe.engine.start import Started, start
from jaxmoe.ffi.attention import paged_attention
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.llm import LLM
from jaxmoe.sampling_params import SamplingParams

_BYTES = ("experts_weight_bytes", "linear_weight_bytes", "attention_kv_bytes")
_FLOPS = ("experts_flops", "linear_flops", "attention_flops")
PAGE_TOKENS = 16


def start_model(model: Path, threads: int, isa: str | None, given: Mapping[str, Any]) -> Started:
    """A checkpoint directory, or random weights of a config.json's shape."""
    options = {
        "model": str(model),
        "num_threads": threads,
        "isa": isa,
        "show_progress": False,
        "page_size": PAGE_TOKENS,
        # Every prompt is computed, whatever was computed before it.
        "prefix_cache": False,
        **given,
    }
    if model.is_file() or not list(model.glob("*.safetensors")):
        options["load_format"] = "dummy"
    return start(EngineConfig.of(options))


class ModelBench:
    """Runs one started model. Prompts are random token ids."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._llm = LLM.on_engine(started.engine, started.tokenizer)
        self._rng = np.random.default_rng(1)

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        vocab = self._started.model_config.vocab_size
        return [self._rng.integers(0, vocab, length).tolist() for _ in range(count)]

    def _counted(self) -> tuple[int, int]:
        stats = self._started.runtime.stats()
        return sum(stats[n] for n in _BYTES), sum(stats[n] for n in _FLOPS)

    def _generate(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, float, float]:
        """Median seconds a token after the first, and the bytes and operations of it all."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        before = self._counted()
        outputs = self._llm.generate(prompts, params)
        after = self._counted()
        tpot_s = statistics.median(o.outputs[0].timings.tpot_s for o in outputs)
        return tpot_s, after[0] - before[0], after[1] - before[1]

    def warm_decode(self, batch: int, context: int) -> None:
        """Compiles, and reads every page once."""
        self._generate(self._prompts(batch, context), 9)

    def decode(self, batch: int, context: int, num_tokens: int, repeats: int) -> Work:
        """Greedy steps of `batch` sequences that begin with `context` tokens. Seconds, bytes and
        operations are those of one step; the prompts' share is measured alone and taken off.
        """
        seconds, num_bytes, flops = [], [], []
        for _ in range(repeats):
            prompts = self._prompts(batch, context)
            _, *alone = self._generate(prompts, 1)
            step_s, *all_of_it = self._generate(prompts, num_tokens + 1)
            seconds.append(step_s)
            num_bytes.append((all_of_it[0] - alone[0]) / num_tokens)
            flops.append((all_of_it[1] - alone[1]) / num_tokens)
        return Work(seconds, statistics.median(num_bytes), statistics.median(flops), batch)

    def warm_prefill(self, length: int) -> None:
        self._generate(self._prompts(1, length), 1)

    def prefill(self, length: int, repeats: int) -> Work:
        """Time to the first token of one prompt."""
        seconds, num_bytes, flops = [], [], []
        for _ in range(repeats):
            (prompt,) = self._prompts(1, length)
            begin = time.perf_counter()
            _, read, done = self._generate([prompt], 1)
            seconds.append(time.perf_counter() - begin)
            num_bytes.append(read)
            flops.append(done)
        return Work(seconds, statistics.median(num_bytes), statistics.median(flops), length)


def model_weights(started: Started) -> tuple[int, float]:
    """Weights of the model, and their mean bytes, scales included."""
    store, state = started.loaded.host_store, started.loaded.state
    leaves = jax.tree.leaves(state)
    count = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
    num_bytes = sum(leaf.nbytes for leaf in leaves)
    if store is not None:
        count += sum(
            layout.num_experts * 3 * layout.hidden * layout.intermediate for layout in store.layouts
        )
        num_bytes += sum(layout.total_bytes for layout in store.layouts)
    return count, num_bytes / count


def attention_chunk(
    runtime: CpuRuntime, config: ModelConfig, tokens: int, context: int, repeats: int
) -> Callable[[], Work]:
    """The attention of one layer for a prompt's last `tokens` tokens of `context`, BF16 cache."""
    attention = config.attention
    if isinstance(attention, CompressedConfig):
        raise ConfigError(f"{config.architecture}'s attention is no one call to be timed alone")
    if isinstance(attention, MlaConfig):
        kv_heads, v_dim = 1, attention.kv_lora_rank
        head_dim = attention.kv_lora_rank + attention.rope_head_dim
        num_heads = attention.num_heads
    else:
        kv_heads, head_dim, num_heads = (
            attention.num_kv_heads, attention.head_dim, attention.num_heads,
        )  # fmt: skip
        v_dim = head_dim
    rng = np.random.default_rng(0)
    pages = -(-context // PAGE_TOKENS)

    def some(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    keys = some(pages, PAGE_TOKENS, kv_heads, head_dim)
    cache = (keys,)
    if not isinstance(attention, MlaConfig):
        cache = (keys, some(pages, PAGE_TOKENS, kv_heads, v_dim))
    q = some(tokens, num_heads, head_dim)
    table = jnp.asarray(rng.permutation(pages).astype(np.int32)[None])
    positions = jnp.arange(context - tokens, context, dtype=jnp.int32)
    token_rows = jnp.zeros(tokens, jnp.int32)

    @jax.jit
    def call(q, cache, token_rows, positions, table):
        return paged_attention(
            runtime,
            q,
            cache,
            token_rows,
            positions,
            table,
            family="matrix",
            scale=head_dim**-0.5,
            v_dim=v_dim,
        )

    def work() -> Work:
        def once() -> None:
            call(q, cache, token_rows, positions, table).block_until_ready()

        once()
        seconds = []
        before = runtime.stats()
        for _ in range(repeats):
            begin = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - begin)
        after = runtime.stats()
        read, done = (
            (after[name] - before[name]) / repeats
            for name in ("attention_kv_bytes", "attention_flops")
        )
        return Work(seconds, read, done, tokens)

    return work


def shapes(config: ModelConfig) -> Mapping[str, Any]:
    """What of a model a figure's reader wants to know."""
    router = config.moe.router
    return {
        "architecture": config.architecture,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "num_experts": router.num_experts,
        "experts_per_token": router.experts_per_token,
    }
