"""The routed experts of one layer, FP8 with block scales: ours and kt-kernel's in turn.

Same dims, threads, chosen experts and minutes; weights lie cold in memory. kt-kernel is given as
the extension file of its wheel for this machine's instruction set (kt_kernel/_kt_kernel_ext_*.so),
and as an interpreter of the wheel's Python version. Its output is compared with NumPy's first.

    tools/bench_kt_kernel.py --extension=PATH --python=python3.12 --dims=qwen3_30b,deepseek_v3 \\
        --tokens 1 8 64 256 1024 --threads=2 --json=FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.cli import bench_kernel
from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.random_init import random_experts

sys.path.insert(0, str(Path(__file__).parent))
import kt_kernel_layer  # noqa: E402

_TOLERANCE = 0.05  # of the largest output: kt-kernel rounds activations and sums to BF16


class Rival:
    """kt-kernel in a process of its own."""

    def __init__(self, python: str, extension: Path, options: dict[str, int]) -> None:
        script = Path(kt_kernel_layer.__file__)
        self._process = subprocess.Popen(
            [python, str(script), str(extension), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._options = options
        self._answer("ready")

    def _answer(self, want: str) -> str:
        """The next line with `want` in it: the extension prints lines of its own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if want in line:
                return line[line.index(want) :]
        raise SystemExit(f"kt-kernel ended with {self._process.wait()} before it answered")

    def run(self, ids: np.ndarray, *, check: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids.tolist(), "check": check}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer('{"seconds"'))

    def check(self) -> float:
        """Largest difference from NumPy for one token, of the largest output."""
        per_token = self._options["per_token"]
        ids = np.arange(per_token)[None, None]
        told = self.run(ids, check=True)
        x = np.asarray(told["x"], np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        want = np.zeros(self._options["hidden"])
        for expert in range(per_token):
            gate, up, down = (self._matrix(3 * (expert % 2) + at, at) for at in range(3))
            g = gate @ x
            want += down @ (g / (1 + np.exp(-g)) * (up @ x)) / per_token
        return float(np.abs(told["output"] - want).max() / np.abs(want).max())

    def _matrix(self, seed: int, at: int) -> np.ndarray:
        rows, cols = self._options["intermediate"], self._options["hidden"]
        if at == 2:
            rows, cols = cols, rows
        codes, scales = kt_kernel_layer.weights(seed, rows, cols)
        blocks = scales.repeat(128, 0).repeat(128, 1)[:rows, :cols]
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * blocks

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extension", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--dims", default="qwen3_30b,deepseek_v3")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64, help="of the layer: cold memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    try:
        all_dims = bench_kernel.parse_dims(given.dims)
    except ConfigError as e:
        parser.error(str(e))
    runtime = CpuRuntime(num_threads=given.threads)
    figures = []
    for dims in all_dims:
        layout = ExpertLayout(given.experts, dims.intermediate, dims.hidden, "fp8_block")
        options = {
            "hidden": dims.hidden,
            "intermediate": dims.intermediate,
            "num_experts": given.experts,
            "per_token": dims.per_token,
            "threads": given.threads,
            "max_tokens": max(given.tokens),
        }
        rival = Rival(given.python, given.extension, options)
        with closing(rival), closing(random_experts(runtime, layout)) as store:
            error = rival.check()
            if not error < _TOLERANCE:
                raise SystemExit(f"kt-kernel's output is off by {error:.3f} of its largest value")
            for tokens in given.tokens:
                figures.append(
                    _compare(runtime, store, rival, dims, given.experts, tokens, given.repeats)
                )
    if given.json is not None:
        found = {"machine": runtime.describe(), "figures": figures}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def _compare(
    runtime: CpuRuntime,
    store: Any,
    rival: Rival,
    dims: bench_kernel.Dims,
    num_experts: int,
    tokens: int,
    repeats: int,
) -> dict[str, Any]:
    family = "vector" if tokens <= bench_kernel.MOST_VECTOR_ROWS else "matrix"
    ids = bench_kernel.chosen_experts(np.random.default_rng(0), num_experts, tokens, dims.per_token)
    ours, theirs, reads = [], [], []
    for _ in range(repeats):
        found = measure.experts(runtime, store, family, ids, 1)
        ours.append(found.seconds[0] / len(ids))
        theirs.append(rival.run(ids)["seconds"] / len(ids))
        ceiling = max(runtime.read_bandwidth(256 << 20, 2))
        reads.append(found.bytes / len(ids) / ceiling)
    ms = {"ours": 1e3 * statistics.median(ours), "kt_kernel": 1e3 * statistics.median(theirs)}
    at_ceiling = 1e3 * statistics.median(reads)
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    print(
        f"{dims.name} tokens={tokens}: ours {ms['ours']:.2f} ms, kt-kernel "
        f"{ms['kt_kernel']:.2f} ms a layer: {ratio:.2f} times; reading alone {at_ceiling:.2f} ms",
        flush=True,
    )
    return {
        "dims": dims.name,
        "tokens": tokens,
        "ms": ms,
        "ratio": ratio,
        "read_ceiling_ms": at_ceiling,
        "ours_s": ours,
        "kt_kernel_s": theirs,
    }


if __name__ == "__main__":
    main()
