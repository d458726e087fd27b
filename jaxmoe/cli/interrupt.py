"""Ctrl-C that cannot get lost.

Python handles a signal at its next bytecode. Where that lies in a garbage collection callback (jax
has one) or a __del__, the KeyboardInterrupt is reported as unraisable and dropped, and the command
would go on to its end. It is raised once more a moment later.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_AGAIN_S = 0.05  # long enough to be out of the callback, too short for a person to notice


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While this runs, a KeyboardInterrupt that Python drops comes again in the main thread."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(_AGAIN_S, _again).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _again() -> None:
    # A signal, not _thread.interrupt_main: it wakes a main thread that waits in a system call.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
