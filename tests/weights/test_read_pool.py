"""The pool of readers, their progress, and the buffers they fill."""

from __future__ import annotations

import threading
import time
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.weights.buffers import aligned_empty, is_aligned, to_jax
from jaxmoe.weights.progress import ByteProgress
from jaxmoe.weights.read_pool import default_threads, run_all


def test_runs_everything_on_that_many_threads() -> None:
    threads: set[int] = set()
    done: list[int] = []
    barrier = threading.Barrier(3, timeout=20)

    def task(i: int) -> None:
        if i < 3:
            barrier.wait()  # passes only if three run at once
        threads.add(threading.get_ident())
        done.append(i)

    run_all([partial(task, i) for i in range(50)], 3)
    assert sorted(done) == list(range(50)) and len(threads) == 3
    assert default_threads() >= 1


def test_first_failure_stops_the_rest() -> None:
    begun: list[int] = []

    def task(i: int) -> None:
        begun.append(i)
        if i == 1:
            raise RuntimeError("task 1")
        time.sleep(0.002)

    with pytest.raises(RuntimeError, match="task 1"):
        run_all([partial(task, i) for i in range(2000)], 2)
    assert len(begun) < 1000


def test_thread_count_is_checked() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        run_all([], 0)


def test_progress_counts_from_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress(4000, "title", show=True) as bar:
        run_all([partial(bar.add, 1)] * 4000, 4)
        assert bar.done == 4000
    assert "title: 100%" in capsys.readouterr().err
    with ByteProgress(10, "title") as bar:  # not a terminal
        bar.add(10)
    assert capsys.readouterr().err == "" and bar.seconds > 0


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (2, 3, 129)])
def test_buffers_are_adopted(shape: tuple[int, ...], dtype: type) -> None:
    buffer = aligned_empty(shape, np.dtype(dtype))
    buffer[...] = np.ones(shape, dtype)
    assert is_aligned(buffer) and buffer.shape == shape and buffer.dtype == dtype
    array = to_jax(buffer)
    assert isinstance(array, jax.Array) and array.dtype == dtype and array.shape == shape
    if buffer.nbytes:
        assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_unaligned_buffer_is_not_taken() -> None:
    raw = aligned_empty((100,), np.dtype(np.uint8))
    with pytest.raises(AssertionError):
        to_jax(raw[1:])
