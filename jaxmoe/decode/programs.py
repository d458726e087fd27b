"""Compiled programs by name, each compiled once: by the first who needs it, while others wait for
that one and for no other.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Program = TypeVar("Program")


class Programs(Generic[Program]):
    """Thread-safe. Nothing is locked while a program is compiled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[Hashable, concurrent.futures.Future[Program]] = {}

    def __len__(self) -> int:
        """Programs that are there."""
        with self._lock:
            return sum(_is_there(future) for future in self._futures.values())

    def __contains__(self, key: Hashable) -> bool:
        """Whether `get` would return at once."""
        with self._lock:
            future = self._futures.get(key)
        return future is not None and _is_there(future)

    def get(self, key: Hashable, compile: Callable[[], Program]) -> Program:
        """The program of that name. What `compile` raises comes out, and leaves no program."""
        while True:
            with self._lock:
                future = self._futures.get(key)
                mine = future is None
                if future is None:
                    future = self._futures[key] = concurrent.futures.Future()
            if mine:
                return self._fill(key, future, compile)
            concurrent.futures.wait((future,))
            if _is_there(future):
                return future.result()
            # Who compiled it has failed, or was interrupted; that is no answer to others.

    def _fill(
        self,
        key: Hashable,
        future: concurrent.futures.Future[Program],
        compile: Callable[[], Program],
    ) -> Program:
        try:
            program = compile()
        except BaseException as e:
            with self._lock:
                del self._futures[key]
            future.set_exception(e)
            raise
        future.set_result(program)
        return program

    def clear(self) -> None:
        """Drops all programs. Nobody may be compiling."""
        with self._lock:
            self._futures.clear()


def _is_there(future: concurrent.futures.Future[Program]) -> bool:
    return future.done() and future.exception() is None
