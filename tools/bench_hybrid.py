"""Decode on a GPU with the routed experts on the CPU: microseconds a layer, and where they go.

Weights are random, at the dimensions of --config cut to --moe_layers. For every batch size a number
of sequences decode together; per MoE layer it prints the step's time, the time the CPU spent in
experts, the time it waited for the next layer's call (attention, router, shared experts and the
hand-over, on the GPU), and the bytes of distinct experts over the experts' time as a fraction of
the read ceiling measured in the same run. Batches of two and more are decoded once more in two
microbatches (decode/dual_batch.py), in turn with the merged steps: what that gains or loses.

    tools/bench_hybrid.py --config=configs/bench/deepseek_v3.json --batch 1 2 4 8
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from jaxmoe import SamplingParams
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.start import Started, start


class Always:
    """So many microbatches, whatever a step is like."""

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches

    def choose(self, contexts: object) -> int:
        return self.num_microbatches

    def observe(self, seconds: float) -> None: ...
    def skip(self) -> None: ...


def decode(started: Started, batch: int, tokens: int, context: int) -> dict[str, float]:
    """Figures of `tokens` steps of `batch` sequences; the first steps, which compile, left out."""
    engine, rng = started.engine, np.random.default_rng(batch)
    params = SamplingParams(temperature=0.0, max_tokens=tokens + 8, ignore_eos=True)
    for _ in range(batch):
        prompt = rng.integers(1, started.model_config.vocab_size, context).tolist()
        engine.add_request(prompt, params)
    times: list[float] = []
    before: dict[str, float] = {}
    while engine.has_work:
        begin = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - begin
        running = engine.scheduler.running
        decoding = len(running) == batch and all(s.output_token_ids for s in running)
        if not decoding:
            continue
        produced = min(len(s.output_token_ids) for s in running)
        if produced == 6:
            before = dict(started.runtime.stats()) | dict(started.runtime.device_stats())
            times.clear()
        elif produced > 6:
            times.append(elapsed)
            if len(times) == tokens - 2:
                after = dict(started.runtime.stats()) | dict(started.runtime.device_stats())
                steps, layers = len(times), len(started.model_config.moe_layers)
                calls = steps * layers
                experts_s = after["experts_s"] - before["experts_s"]
                read = after["experts_weight_bytes"] - before["experts_weight_bytes"]
                result = {
                    "batch": batch,
                    "step_ms": statistics.median(times) * 1e3,
                    "us_per_layer": statistics.median(times) / layers * 1e6,
                    "experts_us_per_layer": experts_s / calls * 1e6,
                    "idle_us_per_layer": (after["idle_s"] - before["idle_s"]) / calls * 1e6,
                    "experts_gb_per_s": read / experts_s / 1e9,
                    "experts_bytes_per_layer": read / calls,
                }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--moe_layers", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    hf = json.loads(args.config.read_text())
    dense = min(hf.get("first_k_dense_replace", 0), 1)
    hf |= {"first_k_dense_replace": dense, "num_hidden_layers": dense + args.moe_layers}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "config.json"
        path.write_text(json.dumps(hf))
        started = start(
            EngineConfig(
                model=str(path),
                load_format="dummy",
                prefill="chunked",
                max_num_seqs=max(args.batch),
                max_model_len=1024,
                prefix_cache=False,
            )
        )
    ceilings = started.runtime.read_bandwidth(1 << 32, 5)
    ceiling = statistics.median(ceilings)
    print(started.report)
    print(f"read ceiling {ceiling / 1e9:.1f} GB/s", flush=True)
    runs = []
    for batch in args.batch:
        run = decode(started, batch, args.tokens, args.context)
        run["experts_fraction_of_ceiling"] = run["experts_gb_per_s"] * 1e9 / ceiling
        if batch > 1:
            started.step.policy = Always(2)
            run["overlapped"] = decode(started, batch, args.tokens, args.context)
            started.step.policy = Always(1)
            again = decode(started, batch, args.tokens, args.context)
            merged = (run["us_per_layer"] + again["us_per_layer"]) / 2
            run["dual_batch_gain"] = merged / run["overlapped"]["us_per_layer"]
        runs.append(run)
        print(
            f"batch {batch}: {run['us_per_layer']:.0f} us a layer (experts "
            f"{run['experts_us_per_layer']:.0f}, waiting for the GPU "
            f"{run['idle_us_per_layer']:.0f}); experts read at "
            f"{run['experts_gb_per_s']:.1f} GB/s = "
            f"{run['experts_fraction_of_ceiling']:.2f} of the ceiling",
            flush=True,
        )
        if batch > 1:
            other = run["overlapped"]
            print(
                f"  in two microbatches {other['us_per_layer']:.0f} us a layer (experts "
                f"{other['experts_us_per_layer']:.0f}, waiting for the GPU "
                f"{other['idle_us_per_layer']:.0f}): {run['dual_batch_gain']:.2f} times as fast",
                flush=True,
            )
    if args.json:
        out = {
            "device": jax.devices()[0].device_kind,
            "ceiling_gb_per_s": ceiling / 1e9,
            "runs": runs,
        }
        args.json.write_text(json.dumps(out, indent=1))
    started.close()


if __name__ == "__main__":
    main()
