"""Runtimes shared by the tests of native operations."""

import pytest

from jaxmoe.ffi.cpu_runtime import CpuRuntime, supported_isas


@pytest.fixture(scope="session", params=supported_isas())
def isa_runtime(request):
    """A runtime of two threads on each instruction set this CPU supports."""
    with CpuRuntime(num_threads=2, isa=request.param) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def runtime():
    with CpuRuntime(num_threads=2) as runtime:
        yield runtime
