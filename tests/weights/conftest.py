"""The native runtime the loader fills a store for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxmoe.ffi.cpu_runtime import CpuRuntime


@pytest.fixture(scope="module")
def runtime() -> Iterator[CpuRuntime]:
    runtime = CpuRuntime(num_threads=1)
    yield runtime
    runtime.close()
