"""Compiles prefill and decode programs for GPUs on a machine without one and reads them: are the
events of streamed layers and the experts' calls in order, are caches and slots used in place, is no
weight copied, are temporaries what the plan says, do devices send each other what they must and
nothing else. The tests of `pytest -m gpu_aot` for a target of one's own, or with other sizes.

    python tools/aot_check.py [TARGET_CONFIG ...] [--model=deepseek_v3] [--layers=61]
        [--only=prefill,dslp,decode]

TARGET_CONFIG: a GpuTargetConfigProto as text (default: those of tests/gpu_aot/targets); XLA ships
some in xla/backends/gpu/target_config/specs. Needs the extra `gpu_aot`: the CUDA plugin and ptxas,
but no driver. Ends with a table in Markdown; what is not right makes the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ("prefill", "dslp", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target_config", type=pathlib.Path, nargs="*")
    parser.add_argument("--model", default="deepseek_v3", help="of configs/bench")
    parser.add_argument("--layers", type=int, default=61, help="of the decode step")
    parser.add_argument("--tokens", type=int, default=8192, help="of a streamed prompt, per device")
    parser.add_argument("--ranks", type=int, default=2, help="devices of one prompt")
    parser.add_argument("--rows", type=int, default=8, help="of the decode step")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only={args.only}: no part {sorted(unknown)}; there are {', '.join(PARTS)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT / "tests"))
    from support import aot, aot_dslp

    wrong = 0
    table = [
        "| target | program | temporaries | updated in place | a device sends |",
        "|---|---|---|---|---|",
    ]

    def tell(
        target: aot.Target,
        what: str,
        programs: dict[str, aot.Compiled],
        problems: list[str],
        sends: dict[str, dict[str, tuple[int, int]]] | None = None,
    ) -> None:
        nonlocal wrong
        wrong += len(problems)
        for name, program in programs.items():
            sent = ", ".join(
                f"{kind} of {n}: {nbytes / 2**20:.1f} MiB"
                for kind, (n, nbytes) in (sends or {}).get(name, {}).items()
            )
            cells = (
                target.name,
                f"{what}{name}",
                f"{program.temp / 2**20:.1f} MiB",
                f"{program.aliased / 2**20:.1f} MiB",
                sent or "nothing",
            )
            table.append(f"| {' | '.join(cells)} |")
            print(*cells, f"compiled in {program.seconds:.0f} s", sep="; ")
        print("\n".join(f"  WRONG: {problem}" for problem in problems) or "  as it must be")
        sys.stdout.flush()

    try:
        for path in args.target_config or aot.TARGETS.values():
            target = aot.Target(path)
            two = aot.bench_config(args.model, 2, dense=1)
            if "prefill" in parts:
                prefill = aot.compile_prefill(target, two, args.tokens)
                print(f"{target.name}: {prefill.plan.describe()}")
                programs = {**prefill.chunks, "experts of a layer": prefill.experts}
                tell(target, "SLP, ", programs, prefill.problems())
            for exchange in ("small_ep", "all_to_all") if "dslp" in parts else ():
                dslp = aot_dslp.compile_dslp(
                    target,
                    two,
                    args.ranks * args.tokens,
                    num_ranks=args.ranks,
                    exchange=exchange,
                    only=None if exchange == "small_ep" else ("send", "back"),
                )
                print(f"{args.ranks} x {target.name}, {exchange}: {dslp.plan.describe()}")
                sends = {name: dslp.sends(name) for name in dslp.programs}
                tell(target, f"DSLP ({exchange}), ", dslp.programs, dslp.problems(), sends)
            config = aot.bench_config(args.model, args.layers, dense=3)
            for n in (1, 2) if "decode" in parts else ():
                decode = aot.compile_decode(target, config, args.rows, n)
                name = f"decode of {args.rows} rows, {args.layers} layers, {n} microbatch" + (
                    "es" if n > 1 else ""
                )
                tell(target, "", {name: decode.step}, decode.problems(aot.DECODE_TEMP_BYTES))
    except aot.ToolsMissing as error:
        sys.exit(str(error))
    print("", *table, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
