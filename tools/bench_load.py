"""Loading speed and memory of a checkpoint directory, from the page cache.

    tools/bench_load.py DIR --repeats=3
    tools/bench_load.py DIR --backing=mmap

Prints, for each repeat, the seconds from opening the directory to a filled model, bytes/s, and the
peak of resident memory beside the size of the files. The first repeat on a fresh virtual machine
also pays for memory that the machine itself has not touched yet.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.memory import gib
from jaxmoe.weights.safetensors_reader import Checkpoint


def warm(files: list[Path]) -> int:
    """Brings the files into the page cache; their bytes."""
    buffer, total = bytearray(16 << 20), 0
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint directory, as shipped or prepared")
    parser.add_argument("--backing", choices=("arena", "mmap"), default="arena")
    parser.add_argument("--threads", type=int, help="parallel reads")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with CpuRuntime() as runtime:
        for _ in range(args.repeats):
            with Checkpoint.open(args.model) as checkpoint:
                file_bytes = warm(list(checkpoint.files))
            start = time.perf_counter()
            with Checkpoint.open(args.model) as checkpoint:
                config = ModelConfig.from_hf(checkpoint.config())
                model = load_model(
                    checkpoint,
                    config,
                    registry,
                    runtime,
                    backing=args.backing,
                    num_threads=args.threads,
                )
            seconds = time.perf_counter() - start
            report = model.report
            model.close()
            del model  # the leaves too: the next repeat starts from nothing
            print(
                f"{args.backing}: {seconds:.2f} s; reading alone {report.seconds:.2f} s, "
                f"{report.bytes_per_s / 1e9:.2f} GB/s; files {gib(file_bytes)}, planned "
                f"{gib(report.planned_bytes)}, peak resident {gib(report.peak_rss_bytes)} "
                f"({(report.peak_rss_bytes - file_bytes) / 1e9:+.2f} GB beside the files)",
                flush=True,
            )


if __name__ == "__main__":
    main()
