"""Compiles prefill and decode programs for GPUs on a machine without one and reads them: are the
events of streamed layers and the experts' calls in order, are caches and slots used in place, is no
weight copied, are temporaries what the plan says. The tests of `pytest -m gpu_aot` for a target of
one's own, or with other sizes.

    python tools/aot_check.py [TARGET_CONFIG ...] [--model=deepseek_v3] [--layers=61]

TARGET_CONFIG: a GpuTargetConfigProto as text (default: those of tests/gpu_aot/targets); XLA ships
some in xla/backends/gpu/target_config/specs. Needs the extra `gpu_aot`: the CUDA plugin and ptxas,
but no driver. What is not right ends the program with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target_config", type=pathlib.Path, nargs="*")
    parser.add_argument("--model", default="deepseek_v3", help="of configs/bench")
    parser.add_argument("--layers", type=int, default=61, help="of the decode step")
    parser.add_argument("--tokens", type=int, default=8192, help="of a streamed prompt")
    parser.add_argument("--rows", type=int, default=8, help="of the decode step")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT / "tests"))
    from support import aot

    wrong = 0

    def tell(what: str, programs: dict[str, aot.Compiled], problems: list[str]) -> None:
        nonlocal wrong
        wrong += len(problems)
        for name, program in programs.items():
            print(
                f"{what}, {name}: temporaries {program.temp / 2**20:.1f} MiB, in place "
                f"{program.aliased / 2**20:.1f} MiB, compiled in {program.seconds:.0f} s"
            )
        print("\n".join(f"  WRONG: {problem}" for problem in problems) or "  as it must be")
        sys.stdout.flush()

    try:
        for path in args.target_config or aot.TARGETS.values():
            target = aot.Target(path)
            prefill = aot.compile_prefill(
                target, aot.bench_config(args.model, 2, dense=1), args.tokens
            )
            print(f"{target.name}: {prefill.plan.describe()}")
            programs = {**prefill.chunks, "experts of a layer": prefill.experts}
            tell(target.name, programs, prefill.problems())
            config = aot.bench_config(args.model, args.layers, dense=3)
            for n in (1, 2):
                decode = aot.compile_decode(target, config, args.rows, n)
                name = f"decode of {args.rows} rows in {n} microbatches"
                tell(target.name, {name: decode.step}, decode.problems(aot.DECODE_TEMP_BYTES))
    except aot.ToolsMissing as error:
        sys.exit(str(error))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
