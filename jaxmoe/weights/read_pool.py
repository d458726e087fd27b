"""Runs many small reads on a few threads; the first failure stops the rest and is the one
raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait


def default_threads() -> int:
    """Enough to keep a disk's queue filled; more than the cores since readers mostly wait."""
    return min(16, 2 * len(os.sched_getaffinity(0)))


def run_all(tasks: Iterable[Callable[[], object]], num_threads: int) -> None:
    """Runs the tasks, started in their order. Returns when all are done.

    Raises:
      Whatever a task raised, after the running ones ended; those not begun are dropped.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, wanted at least 1")
    with ThreadPoolExecutor(num_threads, "jaxmoe-load") as pool:
        futures: list[Future[object]] = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also on KeyboardInterrupt
            for future in futures:
                future.cancel()
    for future in futures:
        if not future.cancelled():
            future.result()
