"""jaxmoe_bench kernel and layer: bare kernels and the routed-experts operation, cold weights.

Weights are random, in a store of their own; a repeat walks through more of them than caches hold.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.cli.bench_machine import Bench, Work
from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.experts import experts as experts_call
from jaxmoe.ffi.linear import Family
from jaxmoe.weights.host_store import ExpertLayout, HostStore
from jaxmoe.weights.param_spec import WeightFormat
from jaxmoe.weights.random_init import random_experts

# Rows up to which a program of the vector family may meet them: a decode batch.
MOST_VECTOR_ROWS = 64
# A repeat of many rows is cut to this much arithmetic a thread: about a tenth of a second.
_GEMM_FLOPS = 2e10
_EMPTY_CALLS = (40, 240)  # in one program; the difference of their times is that of 200 calls


class Dims(NamedTuple):
    """hidden D, intermediate F, experts a token; the name they are known by."""

    name: str
    hidden: int
    intermediate: int
    per_token: int


KNOWN = {
    "deepseek_v3": (7168, 2048, 8),
    "qwen3_30b": (2048, 768, 8),
    "deepseek_v2_lite": (2048, 1408, 6),
    "kimi_k2": (7168, 2048, 8),
    "gpt_oss_120b": (2880, 2880, 4),
}


def parse_dims(text: str) -> list[Dims]:
    """Names of KNOWN or `DxF:A`, with commas between."""
    found = []
    for part in text.split(","):
        if part in KNOWN:
            found.append(Dims(part, *KNOWN[part]))
            continue
        try:
            sizes, _, per_token = part.partition(":")
            hidden, intermediate = (int(size) for size in sizes.split("x"))
            dims = Dims(sizes, hidden, intermediate, int(per_token or 8))
        except ValueError:
            dims = Dims(part, 0, 0, 0)
        if min(dims[1:]) < 1:
            raise ConfigError(
                f"--dims: got {part!r}, wanted HIDDENxINTERMEDIATE:EXPERTS_A_TOKEN or one of "
                + ", ".join(KNOWN)
            )
        found.append(dims)
    return found


def parse_formats(text: str) -> list[WeightFormat]:
    """Names of weight formats, with commas between."""
    known = get_args(WeightFormat)
    for part in text.split(","):
        if part not in known:
            raise ConfigError(f"--formats: got {part!r}, wanted one of {', '.join(known)}")
    return cast(list[WeightFormat], text.split(","))


def experts_for(dims: Dims, weight_format: WeightFormat, least_bytes: int, matrices: int) -> int:
    """As many as it takes for `matrices` matrices of each to be `least_bytes` together."""
    one = ExpertLayout(1, dims.intermediate, dims.hidden, weight_format).total_bytes / 3
    return max(1, int(np.ceil(least_bytes / (matrices * one))))


def _store(
    runtime: CpuRuntime, dims: Dims, weight_format: WeightFormat, num_experts: int
) -> HostStore:
    layout = ExpertLayout(num_experts, dims.intermediate, dims.hidden, weight_format)
    return random_experts(runtime, layout)


def kernels(
    bench: Bench,
    all_dims: Sequence[Dims],
    formats: Sequence[WeightFormat],
    rows: Sequence[int],
    *,
    cold_bytes: int,
    repeats: int,
) -> None:
    """Every kernel that a decode batch or a prompt's chunk of `rows` rows would get."""
    runtime = bench.runtime
    for dims, weight_format in itertools.product(all_dims, formats):
        num_experts = experts_for(dims, weight_format, cold_bytes, 2)
        with closing(_store(runtime, dims, weight_format, num_experts)) as store:
            for count in rows:
                for family, kernel in _families(runtime, weight_format, count):
                    flops = 4.0 * count * dims.hidden * dims.intermediate
                    some = max(1, min(num_experts, int(_GEMM_FLOPS * runtime.num_threads / flops)))

                    def work(
                        family: Family = family,
                        count: int = count,
                        some: int = some,
                        store: HostStore = store,
                    ) -> Work:
                        found = measure.kernel(runtime, store, family, some, count, repeats)
                        return Work(found.seconds, found.bytes, found.flops)

                    bench.figure(
                        f"{kernel} {dims.name} rows={count}",
                        {
                            "op": "kernel",
                            "kernel": kernel,
                            "format": weight_format,
                            "dims": dims.name,
                            "n": dims.intermediate,
                            "k": dims.hidden,
                            "rows": count,
                            "family": family,
                        },
                        work,
                    )


def _families(
    runtime: CpuRuntime, weight_format: WeightFormat, rows: int
) -> list[tuple[Family, str]]:
    """Families that may meet this many rows, each kernel once."""
    families: list[Family] = ["vector"] if rows == 1 else ["vector", "matrix"]
    if rows > MOST_VECTOR_ROWS:
        families = ["matrix"]
    found: dict[str, Family] = {}
    for family in families:
        name = runtime.kernel_name(family, weight_format, bf16_activations=True)
        found.setdefault(name, family)
    return [(family, name) for name, family in found.items()]


def layers(
    bench: Bench,
    all_dims: Sequence[Dims],
    formats: Sequence[WeightFormat],
    tokens: Sequence[int],
    *,
    cold_bytes: int,
    repeats: int,
) -> None:
    """The routed experts of one layer for batches and chunks of `tokens` tokens, and what a call
    costs that has nothing to do.
    """
    runtime = bench.runtime
    rng = np.random.default_rng(0)
    for dims, weight_format in itertools.product(all_dims, formats):
        # A call must not find what an earlier one left in the caches: four times what one reads.
        num_experts = max(experts_for(dims, weight_format, cold_bytes, 3), 4 * dims.per_token)
        with closing(_store(runtime, dims, weight_format, num_experts)) as store:
            for count in tokens:
                family: Family = "vector" if count <= MOST_VECTOR_ROWS else "matrix"
                ids = chosen_experts(rng, num_experts, count, dims.per_token)

                def work(
                    family: Family = family,
                    ids: np.ndarray = ids,
                    count: int = count,
                    store: HostStore = store,
                ) -> Work:
                    found = measure.experts(runtime, store, family, ids, repeats)
                    tokens = len(ids) * count
                    return Work(found.seconds, found.bytes, found.flops, tokens)

                bench.figure(
                    f"experts {weight_format} {dims.name} tokens={count}",
                    {
                        "op": "experts",
                        "kernel": runtime.kernel_name(family, weight_format, bf16_activations=True),
                        "format": weight_format,
                        "dims": dims.name,
                        "hidden": dims.hidden,
                        "intermediate": dims.intermediate,
                        "experts_per_token": dims.per_token,
                        "num_experts": num_experts,
                        "tokens": count,
                        "calls": len(ids),
                        "family": family,
                    },
                    work,
                )


def chosen_experts(
    rng: np.random.Generator, num_experts: int, tokens: int, per_token: int
) -> np.ndarray:
    """ids [calls, tokens, per_token]: each call's first token walks on through a permutation of
    all, so that it meets experts that left the caches; the others choose at random.
    """
    calls = max(1, num_experts // per_token) if tokens <= MOST_VECTOR_ROWS else 1
    picks = rng.random((calls, tokens, num_experts)).argsort(-1)[..., :per_token]
    order = rng.permutation(num_experts)[: calls * per_token]
    picks[:, 0] = order.reshape(calls, per_token)
    return picks.astype(np.int32)


def overheads(runtime: CpuRuntime, repeats: int) -> dict[str, float]:
    """Microseconds of calls without work, median: through FFI inside a compiled program, in C++
    alone, and of a job that wakes all (awake) threads and does nothing.
    """
    dims = Dims("tiny", 2048, 128, 8)
    with closing(_store(runtime, dims, "bf16", dims.per_token)) as store:
        none = np.full((1, 1, dims.per_token), -1, np.int32)
        many = np.repeat(none, 2000, axis=0)
        alone = measure.experts(runtime, store, "vector", many, repeats)
        job = measure.empty_job(runtime, 2000, repeats)
        weights = jnp.zeros((1, dims.per_token), jnp.float32)
        x = jnp.zeros((1, dims.hidden), jnp.float32)
        programs = []
        for calls in _EMPTY_CALLS:

            @jax.jit
            def chain(x: jax.Array, ids: jax.Array, calls: int = calls) -> jax.Array:
                for _ in range(calls):
                    x = experts_call(runtime, store, "vector", x, ids, weights, 0)
                return x

            programs.append(chain)
        ids = jnp.asarray(none[0])
        best = []
        for program in programs:
            program(x, ids).block_until_ready()
            best.append(_times(lambda p=program: p(x, ids).block_until_ready(), 4 * repeats))
    through_ffi = (np.median(best[1]) - np.median(best[0])) / (_EMPTY_CALLS[1] - _EMPTY_CALLS[0])
    return {
        "empty_experts_call_ffi_us": float(through_ffi * 1e6),
        "empty_experts_call_us": float(np.median(alone.seconds) / 2000 * 1e6),
        "empty_pool_job_us": float(np.median(job.seconds) / 2000 * 1e6),
    }


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        out.append(time.perf_counter() - begin)
    return out
