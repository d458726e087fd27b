"""Stream-loading prefill at a model's full width: time a layer, bytes moved, overlap of the two.

Weights are random, at the dimensions of --config cut to --moe_layers; experts lie in host memory as
in a server. Beside the whole prefill it measures, in the same run, its two halves alone: the same
programs with the weights already there (compute), and the same copies with nothing computed (copy).
The overlap ratio is the whole over the larger of the two. --layers says what depth to extrapolate
to. On the CPU platform --copy_gb_per_s limits the copies; --ratios sets the limit so that a layer's
copies take so many times what computing it takes, and gives for each ratio the time of a layer (all
but the first, whose copies nothing can hide) over the larger of the two.

With --devices=2 the same prompts are computed by two devices together afterwards (DSLP); bytes and
rates are those of both. Weights are made and page-locked once.

With --compute_ms the experts' products are replaced by as much sleep a layer, as of a device that
takes no time of the CPUs': what is left is how well events, loader and programs keep both busy.

    tools/bench_prefill.py --config=configs/bench/deepseek_v3.json --tokens 4096 32768
    tools/bench_prefill.py --config=configs/bench/deepseek_v3.json --moe_layers=8 --devices=2
    tools/bench_prefill.py --config=configs/bench/overlap.json --free_gb=2 --tokens 512 \\
        --threads=1 --ratios 0.25 0.5 1 2 4
    tools/bench_prefill.py --config=configs/bench/overlap.json --free_gb=2 --tokens 16 \\
        --moe_layers=8 --compute_ms=200 --ratios 0.25 0.5 1 2 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.models import registry
from jaxmoe.prefill.device import SlpDevice, prompt_row
from jaxmoe.prefill.dslp_devices import DslpDevices
from jaxmoe.weights.random_init import random_model

NUM_GROUPS = 8  # of a layer's experts, where memory is no bound (prefill/plan.py)


class SleepingGroups:
    """`moe.experts_streamed.GroupExperts` that takes time and adds nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def route(self, expert_ids: jax.Array, combine_weights: jax.Array, num_experts: int) -> None:
        return None

    def add(self, y: jax.Array, *args: Any, **options: Any) -> jax.Array:
        def wait(y: jax.Array) -> jax.Array:
            time.sleep(self._seconds)
            return y

        return jax.pure_callback(wait, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


def layer_seconds(run: Iterator[int]) -> list[float]:
    """What each layer took."""
    times = [time.perf_counter()]
    for _ in run:
        times.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(times)]


def overlap_table(
    slp: SlpDevice, driver: DeviceDriver, config: ModelConfig, args: argparse.Namespace
) -> list[dict[str, float]]:
    """A row for each ratio: medians over MoE layers but the first, and over repeats."""
    later = config.moe_layers[1:]
    layer_bytes = slp.streamed_bytes / len(config.moe_layers)
    count = max(args.tokens)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, count).tolist()
    row = prompt_row(ids, slp.page_size)

    def seconds(*, streamed: bool) -> float:
        found = layer_seconds(slp.layers(row, streamed=streamed))
        return statistics.median(found[i] for i in later)

    seconds(streamed=False)  # compiles
    slp.prefill(row)
    rows = []
    for ratio in args.ratios:
        found = []
        for _ in range(args.repeats):
            compute_s = seconds(streamed=False)
            copy_s = ratio * compute_s
            driver.limit_rate(layer_bytes / copy_s)
            whole_s = seconds(streamed=True)
            driver.limit_rate(None)
            compute_s = statistics.mean((compute_s, seconds(streamed=False)))
            found.append((whole_s / max(copy_s, compute_s), compute_s, copy_s, whole_s))
        found.sort()
        over, compute_s, copy_s, whole_s = found[len(found) // 2]
        rows.append(
            {
                "ratio": ratio,
                "compute_s": compute_s,
                "copy_s": copy_s,
                "layer_s": whole_s,
                "over_longer": over,
                "least_over_longer": found[0][0],
            }
        )
        print(
            f"copy : compute {ratio:g}: a layer {whole_s * 1e3:.1f} ms, computing alone "
            f"{compute_s * 1e3:.1f}, copying alone {copy_s * 1e3:.1f}: {over:.3f} of the longer "
            f"(least of {len(found)}: {found[0][0]:.3f})",
            flush=True,
        )
    return rows


def prompts_table(
    prefill: SlpDevice | DslpDevices, config: ModelConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """What each length of prompt takes, whole and its halves alone; medians of --repeats."""
    copy_rate = max(prefill.copy_alone() for _ in range(3))
    print(f"copies alone: {copy_rate / 1e9:.2f} GB/s", flush=True)
    results = []
    rng = np.random.default_rng(0)
    for count in args.tokens:
        row = prompt_row(rng.integers(1, config.vocab_size, count).tolist(), prefill.page_size)

        def seconds(row: StepRow, *, streamed: bool) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(prefill.prefill(row, streamed=streamed))
            return time.perf_counter() - begin

        compute, whole, stats = [], [], {}
        seconds(row, streamed=False)  # compiles
        seconds(row, streamed=True)
        for _ in range(args.repeats):
            compute.append(seconds(row, streamed=False))
            whole.append(seconds(row, streamed=True))
            stats = prefill.stats()
        compute_s, whole_s = statistics.median(compute), statistics.median(whole)
        copy_s = prefill.streamed_bytes / copy_rate
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
            "achieved_gb_per_s": prefill.streamed_bytes / whole_s / 1e9,
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
    return {
        "plan": prefill.plan.describe(),
        "plan_device_bytes": prefill.plan.device_bytes,
        "peak_device_bytes": prefill.peak_bytes(),
        "plain_copy_gb_per_s": copy_rate / 1e9,
        "expert_layer_bytes": prefill.streamed_bytes // args.moe_layers,
        "runs": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--moe_layers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=61, help="layers of the whole model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--devices", type=int, default=1, help="together, after one alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--free_gb", type=float, default=None, help="device memory to use at most")
    parser.add_argument("--copy_gb_per_s", type=float, default=None, help="CPU platform only")
    parser.add_argument("--ratios", type=float, nargs="+", help="copy : compute; CPU platform only")
    parser.add_argument("--compute_ms", type=float, help="of a layer's experts, slept")
    parser.add_argument("--threads", type=int, help="of the CPU kernels; default: all cores")
    parser.add_argument("--weights", choices=("auto", "resident", "streamed"), default="resident")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    hf = json.loads(args.config.read_text())
    dense = hf.get("first_k_dense_replace", 0)
    dense = min(dense, 1)
    hf |= {"first_k_dense_replace": dense, "num_hidden_layers": dense + args.moe_layers}
    config = ModelConfig.from_hf(hf)
    device = jax.devices()[0]
    if args.devices > len(jax.devices()):
        raise SystemExit(f"--devices: wanted {args.devices}, JAX sees {len(jax.devices())}")
    runtime = CpuRuntime(num_threads=args.threads)
    begin = time.perf_counter()
    loaded = random_model(config, registry, runtime)
    print(f"weights made in {time.perf_counter() - begin:.1f} s", flush=True)
    driver = DeviceDriver.for_device(device)
    if device.platform == "cpu":
        driver = DeviceDriver.host(args.copy_gb_per_s and args.copy_gb_per_s * 1e9)
    begin = time.perf_counter()
    assert loaded.host_store is not None
    driver.lock_store(loaded.host_store.native)
    lock_s = time.perf_counter() - begin
    free = args.free_gb and int(args.free_gb * 2**30)
    slp = SlpDevice(
        loaded,
        config,
        device,
        driver,
        runtime,
        max_prompt_tokens=max(args.tokens),
        free_bytes=free,
        chunk_tokens=min(max(args.tokens), 4096),
        weights=args.weights,
        groups=args.compute_ms and SleepingGroups(args.compute_ms / 1e3 / NUM_GROUPS),
    )
    groups = config.moe.router.num_experts // slp.plan.group_experts
    if args.compute_ms and groups != NUM_GROUPS:
        raise SystemExit("--compute_ms: wanted memory for a whole layer in 8 slots (--free_gb)")
    print(f"page-locked in {lock_s:.1f} s; {slp.plan.describe()}", flush=True)
    if args.ratios:
        rows = overlap_table(slp, driver, config, args)
        if args.json:
            plan = slp.plan.describe()
            args.json.write_text(json.dumps({"plan": plan, "overlap": rows}, indent=1))
        return
    out = {
        "device": device.device_kind,
        "config": args.config.name,
        "moe_layers": args.moe_layers,
        "lock_s": lock_s,
    }
    out |= prompts_table(slp, config, args)
    slp.close()
    del slp
    if args.devices > 1:
        devices = jax.devices()[: args.devices]
        drivers = {d: driver if d == device else DeviceDriver.for_device(d) for d in devices}
        together = DslpDevices(
            loaded,
            config,
            devices,
            drivers,
            runtime,
            max_prompt_tokens=max(args.tokens),
            free_bytes=free or min(drivers[d].memory_info()[0] for d in devices) * 8 // 10,
        )
        print(together.plan.describe(), flush=True)
        out["together"] = prompts_table(together, config, args)
        together.close()
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
