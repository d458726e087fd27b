"""Decode speed as a fraction of what the memory delivers: experts op alone, and the whole step.

For one and two threads (or --threads) it prints the read-bandwidth ceiling measured in the same
run, the bytes a decoded token must read, and the achieved fraction of the ceiling. Weights are
random, at the dimensions of --config; every figure is the median of --repeats runs, and all of them
are in the JSON written with --json.

    tools/bench_decode.py --config=configs/bench/qwen3_30b_a3b_cut.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import LLM, SamplingParams
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.start import Started, start
from jaxmoe.ffi.native_ops import NativeOps

CEILING_BYTES = (
    1 << 30
)  # beyond the last-level cache; larger where that is larger, see --ceiling_gb
BYTE_COUNTERS = ("experts_weight_bytes", "linear_weight_bytes", "attention_kv_bytes")


def experts_op(started: Started, batch: int, repeats: int) -> list[float]:
    """Bytes per second of the routed-experts op alone, one figure a repeat.

    Each repeat walks every MoE layer with fresh random experts, so the weights it meets have left
    the caches.
    """
    config, runtime = started.model_config, started.runtime
    ops = NativeOps(runtime, started.loaded.host_store, "vector")
    num_layers = len(config.moe_layers)
    rng = np.random.default_rng(0)

    @jax.jit
    def one_pass(x: jax.Array, expert_ids: jax.Array, combine_weights: jax.Array) -> jax.Array:
        for layer_idx in range(num_layers):
            y = ops.experts(x, expert_ids[layer_idx], combine_weights, layer_idx)
            x = (x.astype(jnp.float32) + 1e-3 * y).astype(x.dtype)
        return x

    router = config.moe.router
    x = jnp.asarray(rng.standard_normal((batch, config.hidden_size)), jnp.bfloat16)
    weights = jnp.full((batch, router.experts_per_token), 1 / router.experts_per_token, jnp.float32)
    rates = []
    # On virtual machines memory is slow to read for the first time; and the first pass compiles.
    warm_up = 4 * router.num_experts // (batch * router.experts_per_token) + 1
    for repeat in range(repeats + warm_up):
        chosen = rng.random((num_layers, batch, router.num_experts)).argsort(-1)
        ids = jnp.asarray(chosen[..., : router.experts_per_token].astype(np.int32))
        bytes_before = runtime.stats()["experts_weight_bytes"]
        begin = time.perf_counter()
        one_pass(x, ids, weights).block_until_ready()
        elapsed = time.perf_counter() - begin
        if repeat >= warm_up:
            rates.append((runtime.stats()["experts_weight_bytes"] - bytes_before) / elapsed)
    return rates


def decode_steps(started: Started, num_tokens: int, repeats: int) -> list[tuple[float, float]]:
    """(seconds, bytes read) per decoded token of one greedy sequence, short context, one a repeat.

    The bytes are counted by the operations themselves: weights and cache they had to read. The
    prompt's one token goes through a prefill step, whose share is measured alone and taken off.
    """
    llm = LLM.on_engine(started.engine, started.tokenizer)
    vocab = started.model_config.vocab_size
    rng = np.random.default_rng(1)

    def counted() -> int:
        stats = started.runtime.stats()
        return sum(stats[name] for name in BYTE_COUNTERS)

    figures = []
    for repeat in range(repeats + 1):
        prompt = [int(rng.integers(0, vocab))]
        marks = [counted()]
        for length in (1, num_tokens + 1):
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            output = llm.generate(prompt, params)[0].outputs[0]
            marks.append(counted())
        prefill_bytes, all_bytes = marks[1] - marks[0], marks[2] - marks[1]
        if repeat:
            figures.append((output.timings.tpot_s, (all_bytes - prefill_bytes) / num_tokens))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=pathlib.Path, required=True, help="a config.json")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--batch", type=int, default=1, help="tokens a step of the experts op alone"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--ceiling_gb", type=float, default=CEILING_BYTES / 1e9, help="memory read for the ceiling"
    )
    parser.add_argument("--isa", default=None, help="force an instruction set")
    parser.add_argument("--json", type=pathlib.Path, help="also write every figure here")
    args = parser.parse_args()

    results = []
    for threads in args.threads:
        started = start(
            EngineConfig.of(
                {
                    "model": str(args.config),
                    "load_format": "dummy",
                    "num_threads": threads,
                    "isa": args.isa,
                    "max_num_seqs": 1,
                    "max_model_len": 256,
                }
            )
        )
        ceiling_bytes = int(args.ceiling_gb * 1e9)
        ceilings = started.runtime.read_bandwidth(ceiling_bytes, args.repeats)
        op_rates = experts_op(started, args.batch, args.repeats)
        ceilings += started.runtime.read_bandwidth(ceiling_bytes, args.repeats)
        steps = decode_steps(started, args.tokens, args.repeats)
        ceilings += started.runtime.read_bandwidth(ceiling_bytes, args.repeats)
        isa = started.runtime.isa
        started.close()

        ceiling = statistics.median(ceilings)
        op_rate = statistics.median(op_rates)
        token_bytes = statistics.median(num_bytes for _, num_bytes in steps)
        step_rate = statistics.median(num_bytes / seconds for seconds, num_bytes in steps)
        tok_per_s = 1 / statistics.median(seconds for seconds, _ in steps)
        results.append(
            {
                "config": args.config.name,
                "isa": isa,
                "threads": threads,
                "batch": args.batch,
                "ceiling_bytes_per_s": ceilings,
                "experts_op_bytes_per_s": op_rates,
                "experts_op_fraction": op_rate / ceiling,
                "decode_s_and_bytes_per_token": steps,
                "bytes_per_token": token_bytes,
                "decode_step_fraction": step_rate / ceiling,
                "tok_per_s": tok_per_s,
            }
        )
        print(
            f"{args.config.stem}  {isa}  {threads} thread{'s' if threads > 1 else ''}: "
            f"ceiling {ceiling / 1e9:.1f} GB/s (from {min(ceilings) / 1e9:.1f} to "
            f"{max(ceilings) / 1e9:.1f}), {token_bytes / 1e6:.0f} MB a token; "
            f"experts op {op_rate / 1e9:.1f} GB/s = {op_rate / ceiling:.2f} of it; "
            f"decode step {step_rate / 1e9:.1f} GB/s = {step_rate / ceiling:.2f} "
            f"({tok_per_s:.2f} tok/s)",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
