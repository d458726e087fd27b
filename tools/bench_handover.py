"""The hand-over between a GPU's stream and the CPU's experts: is it right, what does it cost, what
does it hide.

For each way of signalling (stream memory operations, host functions) it checks that the GPU's
`experts_submit` and `experts_wait` give the bits of the CPU's operation, and measures

    round_trip_us    of a call without work, chained in one program: what every MoE layer pays;
                     once at a hidden size where only the hand-over counts. Operands in three pieces
                     (as they are) and packed into one
    dispatch_us      of the enqueuing thread, a call: it must not wait for the stream
    overlap          of a matmul between submit and wait: 1 hides the shorter one whole, 0 nothing
    dual_batch       two microbatches, attention (a matmul) as long as the experts, over --layers:
                     seconds merged and overlapped, and the fraction of the ideal gain

    python tools/bench_handover.py --json=handover.json       on a machine with a GPU

With --platform=cpu the same programs run on the CPU platform, where nothing can be hidden from the
threads that do both: for a look at the tool itself.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.host_store import NativeHostStore, native_host_store
from jaxmoe.ffi.native_ops import NativeOps

CHAIN = 200  # round trips in one program: the program's own start is a small part


def random_store(runtime: CpuRuntime, layers: int, experts: int, f: int, d: int) -> NativeHostStore:
    """BF16 experts around zero, filled from one random block: values do not matter, bytes do."""
    store = native_host_store(runtime, [(experts, f, d, "bf16")] * layers, "arena")
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 20) / np.sqrt(d)).astype(ml_dtypes.bfloat16).view(np.uint8)
    for layer in range(layers):
        for e in range(experts):
            for which in range(3):
                for _, _, rows in store.segments(layer, e, which):
                    flat = rows.reshape(-1)
                    for begin in range(0, flat.size, block.size):
                        part = flat[begin : begin + block.size]
                        part[:] = block[: part.size]
                store.mark_loaded(layer, e, which)
    return store


def operands(seed: int, tokens: int, experts: int, per_token: int, d: int, dtype: Any) -> list:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, experts)).argsort(-1)[:, :per_token].astype(np.int32)
    return [
        jnp.asarray(rng.standard_normal((tokens, d)), dtype),
        jnp.asarray(ids),
        jnp.asarray(rng.uniform(0.1, 1, ids.shape), jnp.float32),
    ]


def seconds(call: Any, args: tuple, repeats: int) -> tuple[float, float]:
    """Median time of the whole call, and of its dispatch alone."""
    jax.block_until_ready(call(*args))
    whole, dispatch = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call(*args)
        dispatch.append(time.perf_counter() - begin)
        jax.block_until_ready(result)
        whole.append(time.perf_counter() - begin)
    return statistics.median(whole), statistics.median(dispatch)


def check(ops: NativeOps, device: Any, cpu: Any, sizes: dict[str, int]) -> list[str]:
    """Names of the cases whose bits differ."""
    experts, f, d = sizes["experts"], sizes["f"], sizes["d"]
    wrong = []
    rng = np.random.default_rng(1)
    biases = tuple(jnp.asarray(rng.standard_normal((experts, f)), jnp.float32) for _ in range(2))
    for tokens in (1, 2, 8, 33):
        for dtype in (jnp.bfloat16, jnp.float32):
            for with_biases in (False, True):
                options: dict[str, Any] = {}
                if with_biases:
                    options = {"activation": ClampedSwiglu(1.702, 7.0)}
                args = operands(tokens, tokens, experts, min(experts, 4), d, dtype)
                args += list(biases) if with_biases else []

                def whole(x, ids, weights, *b, options=options):
                    return ops.experts(x, ids, weights, 1, biases=b or None, **options)

                def halves(x, ids, weights, *b, options=options):
                    ticket, other = ops.experts_submit(
                        x, ids, weights, 1, x + 1, biases=b or None, **options
                    )
                    y, other = ops.experts_wait(ticket, *x.shape, other * 2)
                    return y, other

                want = np.asarray(jax.jit(whole)(*jax.device_put(args, cpu)))
                there = jax.device_put(args, device)
                got = {"whole": jax.jit(whole)(*there), "halves": jax.jit(halves)(*there)[0]}
                for form, y in got.items():
                    same = np.array_equal(np.asarray(y).view(np.uint32), want.view(np.uint32))
                    if not same or not np.abs(want).max() > 0:
                        wrong.append(f"{form}, {tokens} tokens, {dtype.__name__}, {with_biases=}")
    return wrong


def round_trip(ops: NativeOps, device: Any, d: int, tokens: int, repeats: int) -> dict[str, float]:
    """Calls without work: every expert id is -1."""
    args = [
        jnp.zeros((tokens, d), jnp.bfloat16),
        jnp.full((tokens, 1), -1, jnp.int32),
        jnp.zeros((tokens, 1), jnp.float32),
    ]
    args = jax.device_put(args, device)

    def chain(x, ids, weights, n):
        other = x[:1, :1] + 1
        for _ in range(n):
            ticket, other = ops.experts_submit(x, ids, weights, 0, other)
            _, other = ops.experts_wait(ticket, tokens, d, other)
        return other

    call = jax.jit(chain, static_argnums=3)
    long, dispatch = seconds(lambda *a: call(*a, CHAIN), tuple(args), repeats)
    short, _ = seconds(lambda *a: call(*a, 1), tuple(args), repeats)
    return {
        "round_trip_us": 1e6 * (long - short) / (CHAIN - 1),
        "dispatch_us": 1e6 * dispatch / CHAIN,
    }


def matmuls(h: jax.Array, w: jax.Array, n: int) -> jax.Array:
    """`n` dependent matmuls that stay finite: a stand-in for attention of a chosen length."""
    return jax.lax.fori_loop(0, n, lambda _, a: jnp.tanh(a @ w), h)


def overlap(
    ops: NativeOps, device: Any, sizes: dict[str, int], tokens: int, repeats: int
) -> dict[str, Any]:
    """Experts and a matmul of equal length, one call, then a dual batch over the layers."""
    layers, experts, d = sizes["layers"], sizes["experts"], sizes["d"]
    parts = [
        jax.device_put(operands(s, tokens, experts, sizes["per_token"], d, jnp.bfloat16), device)
        for s in (1, 2)
    ]
    w = jax.device_put(jnp.eye(2048, dtype=jnp.bfloat16), device)
    h = jax.device_put(jnp.full((2048, 2048), 0.1, jnp.bfloat16), device)

    def merged(x, ids, weights, h, w, n, layers):
        for layer in range(layers):
            if n:
                h = matmuls(h, w, n)
            if ids is not None:
                ticket, h = ops.experts_submit(x, ids, weights, layer, h)
                y, h = ops.experts_wait(ticket, *x.shape, h)
                # The next attention needs the experts' result.
                h = h + y.sum().astype(h.dtype) * 0
        return h

    def between(x, ids, weights, h, w, n):
        ticket, h = ops.experts_submit(x, ids, weights, 0, h)
        return ops.experts_wait(ticket, *x.shape, matmuls(h, w, n))

    def dual(a, b, h, w, n, layers):
        state = [(h, None), (h + 0, None)]
        micro = [a, b]
        for layer in range(layers):
            for m in (0, 1):
                x, ids, weights = micro[m]
                own, ticket = state[m]
                if ticket is not None:
                    y, own = ops.experts_wait(ticket, *x.shape, own, slot=m)
                    own = own + y.sum().astype(own.dtype) * 0
                own = matmuls(own, w, n)
                # In a model x comes out of this attention; here passing `own` says that it is over.
                leaves, tree = jax.tree.flatten((own, state[1 - m]))
                ticket, *leaves = ops.experts_submit(x, ids, weights, layer, *leaves, slot=m)
                own, state[1 - m] = jax.tree.unflatten(tree, leaves)
                state[m] = (own, ticket)
        last = []
        for m, (own, ticket) in enumerate(state):
            y, own = ops.experts_wait(ticket, *micro[m][0].shape, own, slot=m)
            last.append((y, own))
        return last

    one = jax.jit(merged, static_argnums=(5, 6))
    none = (None, None, None)

    def gpu_s(n: int) -> float:
        return seconds(lambda: one(*none, h, w, n, layers), (), repeats)[0]

    experts_s, _ = seconds(lambda: one(*parts[0], h, w, 0, layers), (), repeats)
    # As many matmuls as take as long as the experts.
    few, many = gpu_s(1), gpu_s(17)
    n = max(1, round(1 + 16 * (experts_s - few) / max(many - few, 1e-9)))
    attention_s = gpu_s(n)
    serial_s, _ = seconds(lambda: one(*parts[0], h, w, n, layers), (), repeats)

    single = jax.jit(between, static_argnums=5)
    both_s, dispatch_s = seconds(lambda: single(*parts[0], h, w, n), (), repeats)
    matmul_s, _ = seconds(lambda: one(*none, h, w, n, 1), (), repeats)
    call_s, _ = seconds(lambda: one(*parts[0], h, w, 0, 1), (), repeats)

    two = jax.jit(dual, static_argnums=(4, 5))
    dual_s, dual_dispatch_s = seconds(lambda: two(*parts, h, w, n, layers), (), repeats)
    # Without overlap both microbatches cost the sum of both; at best the longer one goes on
    # throughout and the first part of the other comes before it.
    unhidden_s = 2 * (attention_s + experts_s)
    ideal_s = 2 * max(attention_s, experts_s) + min(attention_s, experts_s) / layers
    return {
        "experts_us": 1e6 * call_s,
        "matmul_us": 1e6 * matmul_s,
        "both_us": 1e6 * both_s,
        "both_dispatch_us": 1e6 * dispatch_s,
        "overlap": (call_s + matmul_s - both_s) / min(call_s, matmul_s),
        "dual_batch": {
            "layers": layers,
            "attention_s": attention_s,
            "experts_s": experts_s,
            "one_microbatch_in_turn_s": serial_s,
            "two_in_turn_s": unhidden_s,
            "two_overlapped_s": dual_s,
            "dispatch_s": dual_dispatch_s,
            "ideal_s": ideal_s,
            "of_ideal_gain": (unhidden_s - dual_s) / (unhidden_s - ideal_s),
        },
    }


def print_trip(what: str, trip: dict[str, float]) -> None:
    print(
        f"  {what}, no work: {trip['round_trip_us']:.1f} us a round trip, "
        f"{trip['dispatch_us']:.1f} us of dispatch",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, help="default: all cores but one, for the dispatch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--f", type=int, default=2048, help="expert intermediate size")
    parser.add_argument("--d", type=int, default=7168, help="hidden size")
    parser.add_argument("--per_token", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    try:
        device = jax.devices(args.platform)[0]
    except RuntimeError as error:
        sys.exit(f"no {args.platform} device: {error}")
    cpu = jax.devices("cpu")[0]
    sizes = {k: getattr(args, k) for k in ("layers", "experts", "f", "d", "per_token")}
    report: dict[str, Any] = {"device": str(device), "jax": jax.__version__, **sizes}
    failed = False
    for signal in ("values", "host_functions") if args.platform == "cuda" else ("values",):
        runtime = CpuRuntime(num_threads=args.threads, device_signal=signal)
        if args.threads is None and runtime.num_threads > 1 and args.platform == "cuda":
            threads = runtime.num_threads - 1
            runtime.close()
            runtime = CpuRuntime(num_threads=threads, device_signal=signal)
        figures: dict[str, Any] = {"threads": runtime.num_threads}
        with runtime:
            small = {"experts": 8, "f": 136, "d": 264}
            store = random_store(runtime, 2, small["experts"], small["f"], small["d"])
            ops = NativeOps(runtime, store, "vector")
            packed = NativeOps(runtime, store, "vector", packed=True)
            wrong = check(ops, device, cpu, small)
            wrong += [f"packed: {case}" for case in check(packed, device, cpu, small)]
            print(f"{signal}: {'bits differ: ' + '; '.join(wrong) if wrong else 'bits agree'}")
            print(f"  {runtime.describe_device()}")
            for form, form_ops in (("pieces", ops), ("packed", packed)):
                trip = round_trip(form_ops, device, small["d"], 1, args.repeats)
                figures[f"empty_small_{form}"] = trip
                print_trip(f"1 token of {small['d']}, {form}", trip)
            failed |= bool(wrong)
            figures["wrong"] = wrong
            store.close()
            store = random_store(runtime, args.layers, args.experts, args.f, args.d)
            ops = NativeOps(runtime, store, "vector")
            packed = NativeOps(runtime, store, "vector", packed=True)
            for tokens in (1, 8):
                for form, form_ops in (("pieces", ops), ("packed", packed)):
                    trip = round_trip(form_ops, device, args.d, tokens, args.repeats)
                    figures[f"empty_{tokens}_{form}"] = trip
                    print_trip(f"{tokens} tokens, {form}", trip)
            for tokens in (1, 4):
                found = overlap(ops, device, sizes, tokens, args.repeats)
                figures[f"overlap_{tokens}"] = found
                dual = found["dual_batch"]
                print(
                    f"  {tokens} tokens: experts {found['experts_us']:.0f} us, matmul "
                    f"{found['matmul_us']:.0f} us, both {found['both_us']:.0f} us: overlap "
                    f"{found['overlap']:.2f}"
                )
                print(
                    f"  dual batch of 2 x {tokens}, {args.layers} layers: in turn "
                    f"{1e3 * dual['two_in_turn_s']:.2f} ms, overlapped "
                    f"{1e3 * dual['two_overlapped_s']:.2f} ms, ideal "
                    f"{1e3 * dual['ideal_s']:.2f} ms: {dual['of_ideal_gain']:.2f} of the gain; "
                    f"dispatch {1e3 * dual['dispatch_s']:.2f} ms"
                )
            stats = runtime.device_stats()
            figures["device_stats"] = stats
            runtime.check_device()
            store.close()
        report[signal] = figures
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
