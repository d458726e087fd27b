"""jaxmoe_bench machine: what memory, the bus and the kernels do a second, kept for the engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import ISAS, EngineConfig
from jaxmoe.quant.formats import WeightFormat


def run(given: Mapping[str, Any]) -> int:
    """given: every flag's value."""
    import jax

    from jaxmoe.cli.bench_kernel import parse_formats
    from jaxmoe.engine.machine_bench import MachineBench
    from jaxmoe.engine.machine_rates import known_rates
    from jaxmoe.engine.start import num_threads
    from jaxmoe.ffi.cpu_runtime import CpuRuntime

    threads, isa = given["threads"], given["isa"]
    if threads is not None and not (threads.isdecimal() and int(threads) > 0):
        raise ConfigError(f"--threads: got {threads!r}, wanted one whole number above 0")
    if isa is not None and isa not in ISAS:
        raise ConfigError(f"--isa: got {isa!r}, wanted one of {', '.join(ISAS)}")
    formats = list(get_args(WeightFormat))
    if given["formats"] is not None:
        formats = parse_formats(given["formats"])
    folder = EngineConfig().cache_path
    if given["cache_dir"] is not None:
        folder = Path(given["cache_dir"]).expanduser() if given["cache_dir"] else None
    devices = jax.local_devices()
    with CpuRuntime(num_threads(threads and int(threads), devices[0]), isa=isa) as runtime:

        def on_stage(stage: str) -> None:
            if not given["quiet"]:
                print(f"measuring: {stage}", file=sys.stderr, flush=True)

        bench = MachineBench(runtime, devices, on_stage=on_stage)
        known = known_rates(runtime, devices, folder, formats, bench, anew=given["anew"])
    assert known is not None
    rates = known.rates
    print(f"key      {known.key}\nsource   {known.source}")
    for node, rate in enumerate(rates.read_bytes):
        print(f"memory   node {node}: {rate / 1e9:.2f} GB/s")
    print(f"memory   all nodes: {rates.read_all_bytes / 1e9:.2f} GB/s")
    pairs = zip(devices, rates.copy_bytes, rates.copy_joint_bytes, strict=True)
    for device, alone, joint in pairs:
        print(
            f"copies   {device.device_kind} {device.id}: {alone / 1e9:.2f} GB/s alone, "
            f"{joint / 1e9:.2f} with all {len(devices)}"
        )
    for name in sorted(rates.gemm_flops):
        print(
            f"kernels  {name:10} {rates.gemm_flops[name] / 1e9:9.1f} GFLOP/s at many rows, "
            f"{rates.gemv_bytes[name] / 1e9:7.2f} GB/s at one"
        )
    for name, rate in sorted(rates.device_flops.items()):
        print(f"device   {name:10} {rate / 1e12:9.1f} TFLOP/s at many rows")
    if given["json"]:
        content: dict[str, Any] = {"kind": "machine", "key": known.key, "source": known.source}
        content["rates"] = rates.as_json()
        Path(given["json"]).write_text(json.dumps(content, indent=1) + "\n")
    return 0
