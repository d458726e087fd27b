"""Checks and measures streaming of experts to the device that JAX finds; one JSON of results.

  python tools/check_device.py --json=OUT [--layers=3] [--tiny]

On a GPU: page-locking of a large store, the plain rate of pinned copies, the slot ring's rate as a
fraction of it, that every byte arrives where it belongs, that aborted runs leave a ring that works,
and how well copies and matrix products overlap. The layers are DeepSeek-V3's (256 experts of 2048 x
7168, FP8: 11.3 GB each). With --tiny everything is small, and runs on the CPU as well.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import mmap
import os
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import DeviceDriver
from jaxmoe.ffi.slot_ring import SlotJobs, SlotRing, acquire, expert_buffers, release
from jaxmoe.weights.host_store import ExpertLayout, HostStore

MATRICES = ("gate", "up", "down")
NUM_PATTERNS = 16  # an expert's bytes are a base pattern xor one of so many constants


def pattern(layer: int, expert: int, which: int) -> int:
    return (layer * 7 + expert * 3 + which * 5) % NUM_PATTERNS


def weights_of(count: int) -> np.ndarray:
    """Factors that make a sum of bytes depend on where they are."""
    return (np.arange(count, dtype=np.uint32) % 251) + 1


class Model:
    """A store of patterned experts, and what the sums of its bytes must be."""

    def __init__(self, layout: ExpertLayout, num_layers: int):
        self.layout, self.num_layers = layout, num_layers
        self.runtime = CpuRuntime()
        self.store = HostStore.create(self.runtime, [layout] * num_layers)
        rng = np.random.default_rng(0)
        base = rng.integers(0, 256, layout.matrix_bytes, np.uint8)
        factors = weights_of(layout.matrix_bytes)
        self.sums = [
            int((base ^ np.uint8(c)).astype(np.uint32) @ factors) for c in range(NUM_PATTERNS)
        ]
        self.scale = {
            m: rng.uniform(0.5, 2.0, layout.scale_shape(m)).astype(np.float32) for m in MATRICES
        }
        jobs = [(i, e) for i in range(num_layers) for e in range(layout.num_experts)]
        with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda job: self._fill(*job, base), jobs))

    def _fill(self, layer: int, expert: int, base: np.ndarray) -> None:
        for which, name in enumerate(MATRICES):
            n, _ = self.layout.shape(name)
            rows = base.reshape(n, -1)
            constant = np.uint8(pattern(layer, expert, which))
            for begin, end, view in self.store.native.segments(layer, expert, which):
                np.bitwise_xor(rows[begin:end], constant, out=view)
            self.store.native.mark_loaded(layer, expert, which)
            self.store.set_scale(layer, expert, name, self._scale(layer, expert, name))

    def _scale(self, layer: int, expert: int, name: str) -> np.ndarray:
        return self.scale[name] + np.float32(layer * 1000 + expert)

    def expected(self, layer: int, first: int, count: int) -> list[np.ndarray]:
        """Of the six arrays of a slot, each expert's sum."""
        experts = range(first, first + count)
        sums = [
            np.array([self.sums[pattern(layer, e, w)] for e in experts], np.uint32)
            for w in range(3)
        ]
        for name in MATRICES:
            scales = [self._scale(layer, e, name).reshape(-1).view(np.uint8) for e in experts]
            sums.append(np.array([s.astype(np.uint32) @ weights_of(s.size) for s in scales]))
        return [s.astype(np.uint32) for s in sums]

    def close(self) -> None:
        self.store.close()
        self.runtime.close()


def byte_sums(x: jax.Array, array: jax.Array) -> jax.Array:
    """uint32 [X]: weighted sums of each expert's bytes, read only after x is there (x[0] is 0)."""
    # Every byte is combined with what comes from x (a slice at an index from x would not do: XLA
    # drops one that takes everything), so no read can be moved ahead of the acquire.
    nothing = (x[0] != 0).astype(jnp.uint8)
    array = jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(array.shape[0], -1) ^ nothing
    index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, 1)
    return jnp.sum(array.astype(jnp.uint32) * (index % 251 + 1), axis=1, dtype=jnp.uint32)


class Streaming:
    """A ring over groups of experts, and jobs for all layers, `rounds` times."""

    def __init__(self, model: Model, driver: DeviceDriver, num_slots: int, group: int):
        layout = model.layout
        shapes = expert_buffers(group, layout.intermediate, layout.hidden, layout.format)
        self.ring = SlotRing(
            driver, [[jnp.zeros(s, t) for s, t in shapes] for _ in range(num_slots)]
        )
        self.model, self.num_slots, self.group = model, num_slots, group

    def jobs(self, rounds: int) -> tuple[SlotJobs, list[tuple[int, int, int]]]:
        jobs, groups = SlotJobs(), []
        for _ in range(rounds):
            for layer in range(self.model.num_layers):
                for first in range(0, self.model.layout.num_experts, self.group):
                    slot = len(groups) % self.num_slots
                    jobs.add_experts(self.model.store.native, slot, layer, first, self.group)
                    groups.append((slot, layer, first))
        return jobs, groups

    def guarded(self, compute):
        """Programs, one a slot: acquire, compute(x, slot arrays) -> (x, *results), release.

        Results pass through the release too: XLA may compute each from the slot on its own.
        """

        def make(slot):
            @jax.jit
            def program(x, arrays):
                (x,) = acquire(self.ring, slot, x)
                return release(self.ring, slot, *compute(x, arrays))

            return program

        programs = [make(slot) for slot in range(self.num_slots)]
        return [
            p.lower(jnp.zeros(8), a).compile()
            for p, a in zip(programs, self.ring.slots, strict=True)
        ]

    def run(self, programs, jobs, groups, stop_after: int | None = None):
        """Seconds of the whole run, and each group's result."""
        x, results = jnp.zeros(8), []
        started = time.perf_counter()
        self.ring.start(jobs)
        for i, (slot, _, _) in enumerate(groups):
            if i == stop_after:
                self.ring.abort("enough")
                break
            x, *result = programs[slot](x, self.ring.slots[slot])
            results.append(result)
        try:
            x.block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            # Programs that had not come to their acquire yet when the run was aborted.
            if stop_after is None or "aborted: enough" not in str(error):
                raise
        if stop_after is None:
            self.ring.finish()
        return time.perf_counter() - started, results


def check_rates(model: Model, driver: DeviceDriver, size: int, results: dict) -> None:
    started = time.perf_counter()
    driver.lock_store(model.store.native)
    seconds = time.perf_counter() - started
    results["lock"] = {"bytes": model.store.native.locked_bytes, "seconds": seconds}
    host = np.ones(size, np.uint8)
    lock = driver.lock_arrays({"a buffer": host})
    device = jnp.zeros(size, jnp.uint8)
    results["plain_to_device"] = driver.copy_rate(device, host)
    results["plain_to_host"] = driver.copy_rate(device, host, to_device=False)
    lock.close()
    results["unlocked_to_device"] = driver.copy_rate(device, np.ones(size, np.uint8), 2)


def check_read_only(driver: DeviceDriver, size: int, results: dict) -> None:
    """What is mapped read-only: a sealed store in shared memory, a checkpoint's files.

    Not every driver page-locks such memory; what it answers is the result.
    """
    for name, folder in (("shared_memory", "/dev/shm"), ("file", None)):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(np.ones(size, np.uint8).tobytes())
            file.flush()
            mapping = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
            host = np.frombuffer(mapping, np.uint8)
            try:
                lock = driver.lock_arrays({name: host})
            except OSError as error:
                results[f"read_only_{name}"] = str(error)
                continue
            rates = driver.copy_rate(jnp.zeros(size, jnp.uint8), host)
            results[f"read_only_{name}"] = {"to_device": rates}
            lock.close()


def check_bytes(streaming: Streaming, results: dict) -> None:
    def compute(x, arrays):
        return x, *(byte_sums(x, array) for array in arrays)

    programs = streaming.guarded(compute)
    jobs, groups = streaming.jobs(1)
    _, sums = streaming.run(programs, jobs, groups)
    wrong = 0
    for (_, layer, first), got in zip(groups, sums, strict=True):
        want = streaming.model.expected(layer, first, streaming.group)
        wrong += sum(int((np.asarray(g) != w).sum()) for g, w in zip(got, want, strict=True))
    results["byte_sums"] = {"groups": len(groups), "wrong": wrong}
    if wrong:
        raise AssertionError(f"{wrong} sums of streamed bytes are wrong")

    for stop_after in (1, streaming.num_slots + 1):  # the rest of the run is thrown away
        streaming.run(programs, jobs, groups, stop_after)
    _, again = streaming.run(programs, jobs, groups)
    same = all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for got, want in zip(again, sums, strict=True)
        for a, b in zip(got, want, strict=True)
    )
    results["after_aborts"] = "same sums" if same else "OTHER SUMS"
    if not same:
        raise AssertionError("a run after aborted ones gave other sums")


def check_ring_rate(streaming: Streaming, results: dict) -> None:
    programs = streaming.guarded(lambda x, arrays: (x,))
    jobs, groups = streaming.jobs(2)
    streaming.run(programs, *streaming.jobs(1))
    seconds, _ = streaming.run(programs, jobs, groups)
    plain = float(np.median(results["plain_to_device"]))
    stats = streaming.ring.stats()
    results["ring"] = {
        "bytes_per_s": jobs.total_bytes / seconds,
        "of_plain": jobs.total_bytes / seconds / plain,
        "copies_per_job": jobs.num_copies / len(jobs),
        "stats": stats,
    }


def check_overlap(streaming: Streaming, size: int, results: dict) -> None:
    """A chain of matrix products per slot, of a chosen length relative to the slot's copies."""
    square = jnp.full((size, size), 1.0 / size, jnp.bfloat16)
    jobs, groups = streaming.jobs(1)
    ring_s = jobs.total_bytes / results["ring"]["bytes_per_s"] / len(groups)

    def chain(x, length):
        y = square + x[0].astype(jnp.bfloat16)
        y = jax.lax.fori_loop(0, length, lambda _, y: y @ square, y)
        return x + 0 * y[0, 0].astype(x.dtype)

    # Seconds of one product more, without the fixed part.
    timed = []
    for length in (50, 150):
        program = jax.jit(lambda x, n=length: chain(x, n))
        x = program(jnp.zeros(8)).block_until_ready()
        started = time.perf_counter()
        program(x).block_until_ready()
        timed.append(time.perf_counter() - started)
    product_s = (timed[1] - timed[0]) / 100
    rows = []
    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        length = max(1, round(ratio * ring_s / product_s))
        alone = jax.jit(lambda x, n=length: chain(x, n))
        x = alone(jnp.zeros(8)).block_until_ready()
        started = time.perf_counter()
        for _ in groups:
            x = alone(x)
        x.block_until_ready()
        compute_s = time.perf_counter() - started
        programs = streaming.guarded(lambda x, arrays, n=length: (chain(x, n),))
        streaming.run(programs, jobs, groups)  # a GPU loads a program's kernels at its first run
        seconds, _ = streaming.run(programs, jobs, groups)
        longest = max(compute_s, ring_s * len(groups))
        # The first slot's copies have nothing to hide behind, nor has the last one's computing.
        ideal = longest + min(compute_s / len(groups), ring_s)
        rows.append(
            {
                "compute_s": compute_s,
                "copy_s": ring_s * len(groups),
                "both_s": seconds,
                "over_longest": seconds / longest,
                "over_ideal": seconds / ideal,
            }
        )
    results["overlap"] = rows


def check_contention(driver: DeviceDriver, size: int, num_bytes: int, results: dict) -> None:
    """Products alone, and while another thread keeps the copy engine busy: what no schedule of
    copies can win back."""
    square = jnp.full((size, size), 1.0 / size, jnp.bfloat16)
    program = jax.jit(lambda y: jax.lax.fori_loop(0, 200, lambda _, y: y @ square, y))
    host, device = np.ones(num_bytes, np.uint8), jnp.zeros(num_bytes, jnp.uint8)
    y = program(square).block_until_ready()

    def seconds() -> float:
        started = time.perf_counter()
        program(y).block_until_ready()
        return time.perf_counter() - started

    lock = driver.lock_arrays({"a buffer": host})
    alone_s = min(seconds() for _ in range(3))
    rate = float(np.median(driver.copy_rate(device, host)))
    repeats = max(3, round(3 * alone_s * rate / num_bytes))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        copies = pool.submit(driver.copy_rate, device, host, repeats)
        time.sleep(alone_s / 4)
        beside_s = seconds()
        still_copying = not copies.done()
        rates = copies.result()
    lock.close()
    results["contention"] = {
        "products_alone_s": alone_s,
        "products_beside_copies_s": beside_s,
        "copies_outlasted_them": still_copying,
        "copies_alone_bytes_per_s": rate,
        "copies_beside_bytes_per_s": float(np.median(rates)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, help="where the results go")
    parser.add_argument("--layers", type=int, default=3, help="MoE layers in the store")
    parser.add_argument("--slots", type=int, default=4, help="length of the ring")
    parser.add_argument("--group", type=int, default=32, help="experts a slot")
    parser.add_argument("--tiny", action="store_true", help="16 experts of 64 x 256 a layer")
    args = parser.parse_args()
    device = jax.devices()[0]
    driver = DeviceDriver.for_device(device)
    results: dict = {"device": str(device), "driver": driver.describe(), "failed": {}}
    if not driver.is_host:
        results["memory_bytes"] = driver.memory_info()
    layout = ExpertLayout(16, 64, 256, "fp8_block")
    if not args.tiny:
        layout = ExpertLayout(256, 2048, 7168, "fp8_block")
    started = time.perf_counter()
    model = Model(layout, args.layers)
    results["store"] = {
        "bytes": model.store.total_bytes,
        "nodes": model.runtime.num_nodes,
        "fill_s": time.perf_counter() - started,
    }
    group = min(args.group, 4) if args.tiny else args.group

    streaming = None

    def attempt(name, function, *args):
        try:
            function(*args)
        except Exception as error:
            traceback.print_exc()
            results["failed"][name] = f"{type(error).__name__}: {error}"
            if streaming is not None:
                streaming.ring.abort("a check failed")

    attempt("rates", check_rates, model, driver, 1 << (24 if args.tiny else 30), results)
    attempt("read_only", check_read_only, driver, 1 << (20 if args.tiny else 28), results)
    streaming = Streaming(model, driver, args.slots, group)
    attempt("bytes", check_bytes, streaming, results)
    attempt("ring_rate", check_ring_rate, streaming, results)
    attempt("overlap", check_overlap, streaming, 256 if args.tiny else 8192, results)
    buffer = 1 << (20 if args.tiny else 30)
    attempt("contention", check_contention, driver, 256 if args.tiny else 8192, buffer, results)
    streaming.ring.close()
    model.close()
    text = json.dumps(results, indent=1)
    with open(args.json, "w") as file:
        file.write(text)
    print(text)
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
