"""The GPU kernels on the GPU at hand: held to the reference first, then timed against ceilings.

Ceilings are measured in the same run: a large BF16 matrix product for products, a device-to-device
copy for memory. Prints one line a kernel; --json writes all figures.

    tools/bench_gpu_kernels.py --json=out.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.reference import ReferenceOps, dequantize, paged_attention
from jaxmoe.kernels import attention, experts
from jaxmoe.kernels import grouped_matmul as gm

PAGE = 16


def seconds(f, *args, repeats: int = 5, inner: int = 4) -> float:
    """Median seconds of a call, `inner` calls a repeat."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(inner):
            out = f(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / inner)
    return statistics.median(times)


def codes(rng, shape) -> jax.Array:
    """Random finite E4M3 values of moderate size."""
    raw = rng.integers(0, 2**32, (int(np.prod(shape)) + 3) // 4, np.uint32).view(np.uint8)
    raw = np.where((raw & 0x7F) > 0x60, raw & 0x8F, raw)[: int(np.prod(shape))].reshape(shape)
    return jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.float8_e4m3fn)


def block_scales(rng, *shape) -> jax.Array:
    *lead, n, k = shape
    return jnp.asarray(rng.uniform(1e-3, 2e-3, (*lead, -(-n // 128), -(-k // 128))), jnp.float32)


def worst(got, want) -> float:
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.abs(got - want).max() / np.abs(want).max())


def paged(rng, tokens, heads, kv_heads, dims, context, dtype=jnp.bfloat16):
    pages = -(-context // PAGE)
    cache = tuple(jnp.asarray(rng.standard_normal((pages, PAGE, kv_heads, d)), dtype) for d in dims)
    table = jnp.asarray(rng.permutation(pages)[None], jnp.int32)
    q = jnp.asarray(rng.standard_normal((tokens, heads, dims[0])), dtype)
    return q, cache, table


def check(rng, results) -> None:
    """Every kernel against the reference on this device; a wrong one ends the run."""

    def hold(name: str, got, want, bound: float) -> None:
        error = worst(got, want)
        results[f"error_{name}"] = error
        print(f"{name}: largest error {error:.1e} of the largest value (allowed {bound:.0e})")
        if not error <= bound:
            raise SystemExit(f"{name} is wrong")

    # All codes: every FP8 value times one, exactly.
    every = np.arange(256, dtype=np.uint8)
    every[[0x7F, 0xFF]] = 0
    w = jax.lax.bitcast_convert_type(
        jnp.asarray(np.tile(every, (128, 1)).T.copy()), jnp.float8_e4m3fn
    )
    eye = jnp.eye(128, dtype=jnp.bfloat16)
    y = gm.grouped_matmul(eye, (w[None],), None, gm.whole(128, 128))
    exact = np.array_equal(np.asarray(y), np.asarray(w.astype(jnp.float32)).T)
    print("all FP8 codes:", "exact" if exact else "WRONG")
    if not exact:
        raise SystemExit("FP8 codes are not decoded exactly")
    for tiling in (gm.PREFILL_TILING, gm.DECODE_TILING):
        for n, k in ((576, 1536), (1000, 2880)):
            x = jnp.asarray(rng.standard_normal((100, k)), jnp.bfloat16)
            w = Weight(codes(rng, (n, k)), block_scales(rng, n, k))
            y = gm.grouped_matmul(
                x, (w.data[None],), (w.scale_inv[None],), gm.whole(100, tiling.rows), tiling=tiling
            )
            want = x.astype(jnp.float32) @ dequantize(w).T
            with jax.default_matmul_precision("highest"):
                want = x.astype(jnp.float32) @ dequantize(w).T
            hold(f"linear_{n}x{k}_{tiling.rows}", y, want, 1e-5)
    t, d, f, e, a = 300, 1024, 512, 16, 4
    layer = {
        name: Weight(codes(rng, (e, *s)), block_scales(rng, e, *s))
        for name, s in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f)))
    }
    x = jnp.asarray(rng.standard_normal((t, d)), jnp.bfloat16)
    ids = jnp.asarray(np.stack([rng.permutation(e)[:a] for _ in range(t)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (t, a)), jnp.float32)
    want = ReferenceOps([layer]).experts(x, ids, weights, 0)

    @jax.jit
    def grouped(x, ids, weights, layer):
        routing = experts.sort_by_expert(ids, weights, e, 512)
        y = jnp.zeros((t, d), jnp.float32)
        for first in range(0, e, 4):
            part = slice(first, first + 4)
            group = experts.ExpertGroup(
                *(layer[m].data[part] for m in ("gate", "up", "down")),
                *(layer[m].scale_inv[part] for m in ("gate", "up", "down")),
            )
            y = experts.add_group(y, x, routing, group, first, window=512)
        return y

    hold("experts", grouped(x, ids, weights, layer), want, 1e-2)
    for name, heads, kv, dims, v_dim in (
        ("gqa", 32, 4, (128, 128), 128),
        ("mla", 128, 1, (576,), 512),
        ("gqa_64", 16, 2, (64, 64), 64),
    ):
        q, cache, table = paged(rng, 200, heads, kv, dims, 700)
        rows = jnp.zeros(200, jnp.int32)
        positions = jnp.arange(500, 700, dtype=jnp.int32)
        want = paged_attention(q, cache, rows, positions, table, scale=0.1, v_dim=v_dim)
        flat = [c.reshape(-1, *c.shape[2:]) for c in cache]
        keys = attention.sources(flat[0], heads)
        values = attention.sources(flat[-1], heads, v_dim)
        parts = attention.paged_decode(
            q, keys, values, rows, positions, table, page_size=PAGE, num_splits=16, scale=0.1
        )
        hold(f"decode_{name}", attention.merge(*parts), want, 2e-2)
        if v_dim <= 256:
            tiles = gm.tiles_of(jnp.zeros(1, jnp.int32), jnp.full(1, 200), 200, 128)
            out, _ = attention.flash_attention(
                q, keys, values, tiles, positions, table, page_size=PAGE, scale=0.1
            )
            hold(f"flash_{name}", out, want, 2e-2)


def measure(rng, results) -> None:
    def report(name: str, value: float, unit: str, ceiling: float | None = None) -> None:
        results[name] = value
        share = "" if ceiling is None else f" = {value / ceiling:.2f} of the ceiling"
        print(f"{name}: {value:.1f} {unit}{share}", flush=True)

    a = jnp.asarray(rng.standard_normal((8192, 8192)), jnp.bfloat16)
    peak = 2 * 8192**3 / seconds(jax.jit(lambda x: x @ x), a) / 1e12
    report("bf16_product", peak, "TFLOP/s")
    big = jnp.zeros(1 << 31, jnp.uint8)
    hbm = 2 * big.nbytes / seconds(jax.jit(lambda x: x + 1), big) / 1e9
    report("memory", hbm, "GB/s")
    del a, big

    d, f, x_experts, rows = 7168, 2048, 32, 16384
    x = jnp.asarray(rng.standard_normal((rows, d)), jnp.bfloat16)
    gate, up = codes(rng, (x_experts, f, d)), codes(rng, (x_experts, f, d))
    down = codes(rng, (x_experts, d, f))
    s1, s2 = block_scales(rng, x_experts, f, d), block_scales(rng, x_experts, d, f)
    starts = jnp.arange(x_experts, dtype=jnp.int32) * (rows // x_experts)
    tiles = gm.tiles_of(starts, starts + rows // x_experts, rows, 128)
    for tiling in (
        gm.PREFILL_PAIR_TILING,
        gm.Tiling(128, 64, 4, 3),
        gm.Tiling(128, 128, 8, 3),
        gm.Tiling(64, 128, 4, 3),
    ):
        tiles_here = gm.tiles_of(starts, starts + rows // x_experts, rows, tiling.rows)
        pair = jax.jit(
            partial(
                gm.grouped_matmul,
                combine=lambda g, u: jax.nn.silu(g) * u,
                out_dtype=jnp.bfloat16,
                tiling=tiling,
            )
        )
        try:
            s = seconds(pair, x, (gate, up), (s1, s1), tiles_here)
            name = f"gate_up_{tiling.rows}x{tiling.outputs}_w{tiling.num_warps}s{tiling.num_stages}"
            report(name, 2 * 2 * rows * d * f / s / 1e12, "TFLOP/s", peak)
        except Exception as error:
            print("gate_up", tiling, type(error).__name__, str(error)[:200])
    h = jnp.asarray(rng.standard_normal((rows, f)), jnp.bfloat16)
    for tiling in (gm.PREFILL_TILING, gm.Tiling(128, 128, 4, 3), gm.Tiling(128, 128, 8, 4)):
        try:
            s = seconds(
                jax.jit(partial(gm.grouped_matmul, tiling=tiling)), h, (down,), (s2,), tiles
            )
            name = f"down_{tiling.rows}x{tiling.outputs}_w{tiling.num_warps}s{tiling.num_stages}"
            report(name, 2 * rows * d * f / s / 1e12, "TFLOP/s", peak)
        except Exception as error:
            print("down", tiling, type(error).__name__, str(error)[:200])
    del gate, up, down, x, h

    n, c = 128, 4096
    q = jnp.asarray(rng.standard_normal((c, n, 192)), jnp.bfloat16)
    kn = jnp.asarray(rng.standard_normal((c, n, 128)), jnp.bfloat16)
    kr = jnp.asarray(rng.standard_normal((c, 1, 64)), jnp.bfloat16)
    positions = jnp.arange(c, 2 * c, dtype=jnp.int32)

    @jax.jit
    def mla(q, kn, kr, v, positions, span):
        tiles = gm.tiles_of(jnp.zeros(1, jnp.int32), jnp.full(1, c, jnp.int32), c, 128)
        keys = [attention.Source(kn, 0, 128, 1), attention.Source(kr, 0, 64, n)]
        return attention.flash_attention(
            q, keys, [attention.Source(v, 0, 128, 1)], tiles, positions, None, span=span, scale=0.1
        )

    s = seconds(mla, q, kn, kr, kn, positions, jnp.asarray([0, c], jnp.int32))
    report("flash_mla_expanded", 2 * c * c * n * (192 + 128) / s / 1e12, "TFLOP/s", peak)
    q, cache, table = paged(rng, c, 32, 4, (128, 128), 2 * c)
    flat = [a.reshape(-1, *a.shape[2:]) for a in cache]

    @jax.jit
    def gqa(q, k, v, positions, table):
        tiles = gm.tiles_of(jnp.zeros(1, jnp.int32), jnp.full(1, c, jnp.int32), c, 128)
        return attention.flash_attention(
            q,
            attention.sources(k, 32),
            attention.sources(v, 32),
            tiles,
            positions,
            table,
            page_size=PAGE,
            scale=0.1,
        )

    s = seconds(gqa, q, *flat, positions, table)
    report("flash_gqa_paged", 2 * 1.5 * c * c * 32 * 256 / s / 1e12, "TFLOP/s", peak)

    for n_out, k in ((24576, 1536), (1536, 7168), (7168, 16384), (129280, 7168)):
        w, sc = codes(rng, (1, n_out, k)), block_scales(rng, 1, n_out, k)
        x = jnp.asarray(rng.standard_normal((1, k)), jnp.bfloat16)
        for tiling in (gm.DECODE_TILING, gm.Tiling(16, 16, 4, 4), gm.Tiling(16, 64, 4, 4)):
            f_lin = jax.jit(
                lambda x, w, sc, tiling=tiling: gm.grouped_matmul(
                    x, (w,), (sc,), gm.whole(1, 16), tiling=tiling
                )
            )
            s = seconds(f_lin, x, w, sc, inner=20)
            report(f"decode_linear_{n_out}x{k}_{tiling.outputs}", w.nbytes / s / 1e9, "GB/s", hbm)
    for context in (4096, 32768):
        q, cache, table = paged(rng, 1, 128, 1, (576,), context)
        flat = cache[0].reshape(-1, 1, 576)
        row, position = jnp.zeros(1, jnp.int32), jnp.full(1, context - 1, jnp.int32)

        @jax.jit
        def mla_decode(q, flat, row, position, table):
            parts = attention.paged_decode(
                q,
                attention.sources(flat, 128),
                attention.sources(flat, 128, 512),
                row,
                position,
                table,
                page_size=PAGE,
                num_splits=16,
                scale=0.1,
            )
            return attention.merge(*parts)

        s = seconds(mla_decode, q, flat, row, position, table, inner=20)
        report(f"mla_decode_{context}", s * 1e6, "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--check_only", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(device.device_kind, jax.__version__)
    results: dict[str, float] = {}
    rng = np.random.default_rng(0)
    check(rng, results)
    if not args.check_only:
        measure(rng, results)
    if args.json:
        args.json.write_text(json.dumps({"device": device.device_kind, **results}, indent=1))


if __name__ == "__main__":
    main()
