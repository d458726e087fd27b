"""The measurements behind machine_rates.py: some seconds in all, on the engine's own threads.

DRAM is read by node and by all threads at once; page-locked memory is copied to every device alone,
then to all at once; the bare kernels run over weights that no cache holds, at one activation row
and at many.
"""

from __future__ import annotations

import concurrent.futures
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.engine.machine_rates import MachineRates
from jaxmoe.engine.read_ceiling import last_level_bytes
from jaxmoe.ffi import measure
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device, DeviceDriver
from jaxmoe.ffi.ops import Ops, Weight
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.quant.formats import FORMATS, WeightFormat, data_shape, scale_shape
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.random_init import random_experts

# A third of what a large model's expert has: what is read at a stretch is still megabytes.
_HIDDEN, _INTERMEDIATE = 4096, 1024
_BEYOND_CACHE, _LEAST_COLD, _MOST_COLD = 2, 128 << 20, 1 << 30
_LEAST_READ = 256 << 20  # of a node
_COPY_BYTES = 256 << 20  # 5 ms over PCIe 5: long against what starting a copy takes
_REPEATS = 3
_GEMM_ROWS = 128  # tiles are full, and what is packed once is used often
_GEMM_FLOPS = 1e10  # of a repeat and thread: under a tenth of a second where it is not scalar
# Of a product on a GPU: one of DeepSeek-V3's experts over 8192 tokens, about a millisecond.
_DEVICE_ROWS, _DEVICE_N, _DEVICE_K = 8192, 2048, 7168
_DEVICE_CALLS = 20
DEVICE_FORMATS: tuple[WeightFormat, ...] = ("bf16", "fp8_block")  # that a GPU's kernels read


class MachineBench:
    """`machine_rates.Measure` of one runtime and some devices. on_stage: told what is measured."""

    def __init__(
        self,
        runtime: CpuRuntime,
        devices: Sequence[Device],
        *,
        copy_bytes: int = _COPY_BYTES,
        least_bytes: int = _LEAST_COLD,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self._runtime, self._devices = runtime, devices
        self._copy_bytes, self._on_stage = copy_bytes, on_stage
        self._cold_bytes = min(max(_BEYOND_CACHE * last_level_bytes(), least_bytes), _MOST_COLD)
        self._read_bytes = min(max(self._cold_bytes, min(least_bytes * 2, _LEAST_READ)), _MOST_COLD)
        self._wall_s = self._cpu_s = 0.0

    def __call__(self, formats: Sequence[WeightFormat]) -> tuple[MachineRates, float]:
        """The rates, and which share of their time the kernels' threads ran."""
        self._on_stage("reading memory")
        nodes = self._runtime.num_nodes
        per_node = [
            statistics.median(self._runtime.read_bandwidth(self._read_bytes, _REPEATS, node=node))
            for node in range(nodes)
        ]
        together = per_node[0]
        if nodes > 1:
            size = self._read_bytes * nodes
            together = statistics.median(self._runtime.read_bandwidth(size, _REPEATS))
        self._on_stage("copying to devices")
        alone, joint = copy_rates(self._devices, self._copy_bytes)
        gemm, gemv = {}, {}
        for weight_format in formats:
            self._on_stage(f"products in {weight_format}")
            gemm[weight_format], gemv[weight_format] = self._kernels(weight_format)
        on_device = {}
        device = self._devices[0]
        if device.platform != "cpu":
            self._on_stage("products on the device")
            ops = DeviceOps(None, "prefill")
            on_device = {f: device_flops(device, ops, f) for f in DEVICE_FORMATS}
        share = self._cpu_s / (self._wall_s * self._runtime.num_threads) if self._wall_s else 1.0
        rates = MachineRates(
            tuple(per_node), together, alone, joint, gemm, gemv, on_device, time.time()
        )
        return rates, share

    def _kernels(self, weight_format: WeightFormat) -> tuple[float, float]:
        """FLOP/s at many rows and bytes per second at one."""
        one = ExpertLayout(1, _INTERMEDIATE, _HIDDEN, weight_format).total_bytes
        count = max(1, -(-3 * self._cold_bytes // (2 * one)))
        layout = ExpertLayout(count, _INTERMEDIATE, _HIDDEN, weight_format)
        product = 4.0 * _GEMM_ROWS * _INTERMEDIATE * _HIDDEN  # of gate and up
        some = max(1, min(count, round(_GEMM_FLOPS * self._runtime.num_threads / product)))
        with closing(random_experts(self._runtime, layout)) as store:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            one_row = measure.kernel(self._runtime, store, "vector", count, 1, _REPEATS)
            many = measure.kernel(self._runtime, store, "matrix", some, _GEMM_ROWS, _REPEATS)
            self._wall_s += time.perf_counter() - wall_s
            self._cpu_s += time.process_time() - cpu_s
        return (
            many.flops / statistics.median(many.seconds),
            one_row.bytes / statistics.median(one_row.seconds),
        )


def copy_rates(
    devices: Sequence[Device], num_bytes: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes per second of page-locked copies to each device: alone, and all of them at once.

    Raises: OSError where memory cannot be page-locked or a copy fails.
    """
    drivers = [DeviceDriver.for_device(device) for device in devices]
    hosts = [np.ones(num_bytes, np.uint8) for _ in devices]
    arrays = [jax.device_put(jnp.zeros(num_bytes, jnp.uint8), device) for device in devices]
    locks = [
        driver.lock_arrays({"a buffer": host}) for driver, host in zip(drivers, hosts, strict=True)
    ]
    together = threading.Barrier(len(devices))

    def copy(index: int, *, waits: bool) -> float:
        if waits:
            together.wait()
        rates = drivers[index].copy_rate(arrays[index], hosts[index], _REPEATS)
        return statistics.median(rates)

    try:
        alone = tuple(copy(i, waits=False) for i in range(len(devices)))
        if len(devices) == 1:
            return alone, alone
        with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
            joint = tuple(pool.map(lambda i: copy(i, waits=True), range(len(devices))))
        return alone, joint
    finally:
        for lock in locks:
            lock.close()


def device_flops(
    device: Device,
    ops: Ops,
    weight_format: WeightFormat,
    *,
    rows: int = _DEVICE_ROWS,
    n: int = _DEVICE_N,
    k: int = _DEVICE_K,
) -> float:
    """Operations per second of `ops.linear` at many rows, BF16 activations."""
    info = FORMATS[weight_format]
    with jax.default_device(device):
        data = jnp.ones(data_shape(weight_format, n, k), jnp.dtype(info.data_dtype))
        scales = scale_shape(weight_format, n, k)
        scale = None if scales is None else jnp.ones(scales, jnp.dtype(info.scale_dtype))
        x = jnp.ones((rows, k), jnp.bfloat16)
        program = jax.jit(lambda x, data, scale: ops.linear(x, Weight(data, scale)))
        program(x, data, scale).block_until_ready()
        seconds = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            y = None
            for _ in range(_DEVICE_CALLS):
                y = program(x, data, scale)
            jax.block_until_ready(y)
            seconds.append((time.perf_counter() - begin) / _DEVICE_CALLS)
    return 2.0 * rows * n * k / statistics.median(seconds)
