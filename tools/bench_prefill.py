"""Stream-loading prefill at a model's full width: time a layer, bytes moved, overlap of the two.

Weights are random, at the dimensions of --config cut to --moe_layers; experts lie in host memory as
in a server. Beside the whole prefill it measures, in the same run, its two halves alone: the same
programs with the weights already there (compute), and the same copies with nothing computed (copy).
The overlap ratio is the whole over the larger of the two. --layers says what depth to extrapolate
to. On the CPU platform --copy_gb_per_s limits the copies, so that any ratio can be set.

    tools/bench_prefill.py --config=configs/bench/deepseek_v3.json --tokens 4096 32768
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import jax
import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.models import registry
from jaxmoe.prefill.device import SlpDevice, prompt_row
from jaxmoe.weights.random_init import random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--moe_layers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=61, help="layers of the whole model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--free_gb", type=float, default=None, help="device memory to use at most")
    parser.add_argument("--copy_gb_per_s", type=float, default=None, help="CPU platform only")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    hf = json.loads(args.config.read_text())
    dense = hf.get("first_k_dense_replace", 0)
    dense = min(dense, 1)
    hf |= {"first_k_dense_replace": dense, "num_hidden_layers": dense + args.moe_layers}
    config = ModelConfig.from_hf(hf)
    device = jax.devices()[0]
    runtime = CpuRuntime()
    begin = time.perf_counter()
    loaded = random_model(config, registry, runtime)
    print(f"weights made in {time.perf_counter() - begin:.1f} s", flush=True)
    driver = DeviceDriver.for_device(device)
    if device.platform == "cpu":
        driver = DeviceDriver.host(args.copy_gb_per_s and args.copy_gb_per_s * 1e9)
    begin = time.perf_counter()
    driver.lock_store(loaded.host_store.native)
    lock_s = time.perf_counter() - begin
    free = args.free_gb and int(args.free_gb * 2**30)
    slp = SlpDevice(
        loaded, config, device, driver, runtime, max_prompt_tokens=max(args.tokens), free_bytes=free
    )
    print(f"page-locked in {lock_s:.1f} s; {slp.plan.describe()}", flush=True)
    copy_rate = max(slp.copy_alone() for _ in range(3))
    print(f"copies alone: {copy_rate / 1e9:.2f} GB/s", flush=True)
    results = []
    rng = np.random.default_rng(0)
    for count in args.tokens:
        row = prompt_row(rng.integers(1, config.vocab_size, count).tolist(), slp.page_size)
        compute, whole, stats = [], [], {}
        slp.prefill(row, streamed=False)  # compiles
        slp.prefill(row)
        for _ in range(args.repeats):
            begin = time.perf_counter()
            slp.prefill(row, streamed=False)
            compute.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            slp.prefill(row)
            whole.append(time.perf_counter() - begin)
            stats = slp.stats()
        compute_s, whole_s = statistics.median(compute), statistics.median(whole)
        copy_s = slp.streamed_bytes / copy_rate
        per_layer = whole_s / args.moe_layers
        result = {
            "tokens": count,
            "prefill_s": whole,
            "compute_alone_s": compute,
            "copy_alone_s": copy_s,
            "ms_per_moe_layer": per_layer * 1e3,
            "overlap_ratio": whole_s / max(copy_s, compute_s),
            "copy_gb_per_s": stats["bytes"] / stats["copy_s"] / 1e9,
            "copy_fraction_of_plain": stats["bytes"] / stats["copy_s"] / copy_rate,
            "achieved_gb_per_s": slp.streamed_bytes / whole_s / 1e9,
            "ttft_s_of_all_layers": per_layer * args.layers,
            "acquire_wait_s": stats["acquire_wait_s"],
            "loader_wait_s": stats["loader_wait_s"],
        }
        results.append(result)
        print(
            f"{count} tokens: {per_layer * 1e3:.1f} ms a MoE layer (compute alone "
            f"{compute_s / args.moe_layers * 1e3:.1f}, copy alone "
            f"{copy_s / args.moe_layers * 1e3:.1f}), overlap ratio {result['overlap_ratio']:.3f}, "
            f"copies at {result['copy_gb_per_s']:.1f} GB/s = "
            f"{result['copy_fraction_of_plain']:.2f} of plain; {args.layers} layers: "
            f"{result['ttft_s_of_all_layers']:.1f} s, "
            f"{count / result['ttft_s_of_all_layers']:.0f} tok/s",
            flush=True,
        )
    if args.json:
        out = {
            "device": device.device_kind,
            "config": args.config.name,
            "moe_layers": args.moe_layers,
            "plan": slp.plan.describe(),
            "plan_device_bytes": slp.plan.device_bytes,
            "peak_device_bytes": slp.peak_bytes(),
            "lock_s": lock_s,
            "plain_copy_gb_per_s": copy_rate / 1e9,
            "expert_layer_bytes": slp.streamed_bytes // args.moe_layers,
            "runs": results,
        }
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
