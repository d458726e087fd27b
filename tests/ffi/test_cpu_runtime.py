"""CpuRuntime: options, report, errors."""

import os
import subprocess
import sys

import pytest

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi.cpu_runtime import CpuRuntime, supported_isas


def test_defaults_and_report():
    cpus = os.sched_getaffinity(0)
    with CpuRuntime() as runtime:
        assert 1 <= runtime.num_threads <= len(cpus)
        assert runtime.isa == supported_isas()[-1]
        report = runtime.describe()
        assert runtime.isa in report and "NUMA node" in report and "thread" in report
        assert "forced" not in report
        assert set(runtime.stats().values()) == {0}


@pytest.mark.parametrize("isa", supported_isas())
def test_isa_override(isa):
    with CpuRuntime(num_threads=1, isa=isa) as runtime:
        assert runtime.isa == isa and "forced" in runtime.describe()


def test_fake_topology():
    cpu = min(os.sched_getaffinity(0))
    with CpuRuntime(numa_nodes=[[cpu], [cpu]]) as runtime:
        assert (runtime.num_nodes, runtime.num_threads) == (2, 2)
        assert "fake" in runtime.describe()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_threads": 10**6}, "num_threads is 1000000; wanted 1 to"),
        ({"isa": "neon"}, '"neon"; wanted one of scalar, avx2'),
        ({"numa_nodes": [[0], [100_000]]}, "CPU 100000"),
        ({"numa_nodes": []}, "at least one node"),
        ({"numa_nodes": [[0]] * 9}, "9 NUMA nodes"),
    ],
)
def test_impossible_options(options, match):
    with pytest.raises(ConfigError, match=match):
        CpuRuntime(**options)


def test_closing_twice_and_ids():
    first, second = CpuRuntime(num_threads=1), CpuRuntime(num_threads=1)
    low = first.id
    assert low < second.id
    first.close()
    first.close()
    with pytest.raises(ValueError, match="closed"):
        _ = first.id
    with CpuRuntime(num_threads=1) as third:
        assert third.id == low
    second.close()


def test_a_process_may_end_with_everything_open():
    """No crash and no hang at exit: threads, a store, a submitted call."""
    code = """
import jax.numpy as jnp
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.host_store import native_host_store
from jaxmoe.ffi.native_ops import NativeOps
runtime = CpuRuntime(num_threads=2)
store = native_host_store(runtime, [(2, 16, 32, "bf16")], "arena")
for which in range(3):
    store.mark_loaded(0, 1, which)
args = jnp.ones((1, 32)), jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1))
NativeOps(runtime, store, "vector").experts_submit(*args, 0)[0].block_until_ready()
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
