"""How much of the ideal overlap a decode step in two microbatches reaches, without a GPU.

A stand-in takes the device's place: it sleeps as long for a microbatch's attention as another
thread, in the CPU's place, sleeps for its experts. Everything else is real: the model, the compiled
program, its order. Sleeping costs no core, so the figures do not depend on what else runs here.

    python tools/bench_dual_batch.py [--milliseconds=5] [--layers=8] [--json=FILE]

in turn: a microbatch's attention, then its experts, for both, on every layer. Ideal: both threads
busy all the time, but for the first attention and the last experts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support import tiny_engine  # noqa: E402
from support.stand_in_ops import StandInOps  # noqa: E402

from jaxmoe.decode import dual_batch  # noqa: E402
from jaxmoe.ffi.ops import StepInputs  # noqa: E402
from jaxmoe.kv_cache import store  # noqa: E402
from jaxmoe.models.decoder import cache_spec  # noqa: E402

ROWS, PAGE_SIZE = 4, 8


class SleepingOps(StandInOps):
    """Whose experts compute nothing: the reference's would cost more than they sleep."""

    def experts(self, x, *args, **options):
        return 0.5 * x.astype(jnp.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--milliseconds", type=float, default=5.0, help="of a microbatch's attention"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    busy_s = args.milliseconds * 1e-3
    tiny = tiny_engine.model(tiny_engine.config(num_hidden_layers=args.layers))
    ops = SleepingOps([])

    def step(state, step, caches):
        model = nnx.merge(tiny.graphdef, state)
        return dual_batch.forward(model, step, caches, ops, jnp.arange(ROWS), 2)

    program = jax.jit(step)
    rows = np.arange(ROWS, dtype=np.int32)
    inputs = StepInputs(rows, 0 * rows, rows, rows * PAGE_SIZE, rows[:, None])

    def seconds() -> float:
        caches = store.allocate(cache_spec(tiny.config, "float32"), ROWS, PAGE_SIZE)
        begin = time.perf_counter()
        jax.block_until_ready(program(tiny.state, inputs, caches))
        return time.perf_counter() - begin

    seconds()
    own_s = statistics.median(seconds() for _ in range(args.repeats))  # of the program itself
    ops.on_attention = ops.on_experts = lambda: time.sleep(busy_s)
    measured = [seconds() for _ in range(args.repeats)]
    overlapped_s = statistics.median(measured)
    ops.close()
    in_turn_s = own_s + 4 * args.layers * busy_s
    ideal_s = own_s + (2 * args.layers + 1) * busy_s
    report = {
        "layers": args.layers,
        "attention_s": busy_s,
        "program_s": own_s,
        "in_turn_s": in_turn_s,
        "ideal_s": ideal_s,
        "overlapped_s": measured,
        "of_ideal_gain": (in_turn_s - overlapped_s) / (in_turn_s - ideal_s),
    }
    print(
        f"{args.layers} layers, {args.milliseconds} ms each: in turn {1e3 * in_turn_s:.1f} ms, "
        f"ideal {1e3 * ideal_s:.1f} ms, overlapped {1e3 * overlapped_s:.1f} ms: "
        f"{report['of_ideal_gain']:.3f} of the ideal gain (program itself {1e3 * own_s:.1f} ms)"
    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
