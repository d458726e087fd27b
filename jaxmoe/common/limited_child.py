"""A Python process for work that may take too much time or memory, or end whoever does it: a
message in, an answer out, and an end for the process where there is none.

Messages are JSON behind a length of 4 bytes, over pipes. What it does not do: know the work. The
child's half is `serve`, which sets its own limits.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import IO, Any

from jaxmoe.common.errors import CapacityError


class LimitedChild:
    """Owns the child, started at first use and again after it was lost. Thread-safe: one question
    at a time.

    Args:
        code: what the child runs; it calls `serve`.
        describe: its first message, made when a child starts; it is answered by null.
        start_timeout_s: for that answer.
    """

    def __init__(self, code: str, describe: Callable[[], Any], start_timeout_s: float) -> None:
        self._code = code
        self._describe = describe
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], Any] = lambda: None

    def ask(self, message: Any, timeout_s: float) -> Any:
        """The child's answer. Raises TimeoutError and EOFError, after which there is no child, and
        CapacityError where none can be started.
        """
        with self._lock:
            child = self._started()
            try:
                _send(child.stdin, message)
                return _receive(child.stdout, timeout_s)
            except TimeoutError:
                self._end()
                raise
            except OSError as e:
                self._end()
                raise EOFError("the child is gone") from e
            except BaseException:
                self._end()  # its next answer would be this one's
                raise

    def start(self) -> None:
        """Now instead of at first use; CapacityError."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """Ends the child, and with it the question that it may be answering."""
        child = self._child
        if child is not None:
            child.kill()  # whoever waits for it holds the lock
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end()
        try:
            child = _spawn(self._code)
            self._child, self._stop = child, weakref.finalize(self, _kill, child)
            _send(child.stdin, self._describe())
            _receive(child.stdout, self._start_timeout_s)
        except (TimeoutError, EOFError, OSError) as e:
            self._end()
            raise CapacityError(
                f"a process of limited memory did not start ({e!r}); free memory or processes"
            ) from None
        return child

    def _end(self) -> None:
        self._stop()
        self._child = None


def serve(
    begin: Callable[[Any], Callable[[Any], Any]],
    *,
    memory_bytes: int,
    stack_bytes: int,
    cpu_s: int,
) -> None:
    """The child: `begin` takes the first message and gives what answers all further ones.

    memory_bytes: address space. stack_bytes: tighter than the parent's, so that deep recursion ends
    this process first. cpu_s: of each answer, should the parent be gone.
    """
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this one
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(stack_bytes)

    def run() -> None:
        answer = begin(_read_stdin())
        _send(sys.stdout.buffer, None)
        while (message := _read_stdin()) is not None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            end = int(used.ru_utime + used.ru_stime) + cpu_s
            resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
            _send(sys.stdout.buffer, answer(message))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def _read_stdin() -> Any:
    head = sys.stdin.buffer.read(4)
    return json.loads(sys.stdin.buffer.read(int.from_bytes(head, "little"))) if head else None


def _spawn(code: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        # -P: or modules that lie in the working directory would be imported and run.
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:
            pass  # what was still to be written to it


def _send(pipe: IO[bytes] | None, message: Any) -> None:
    assert pipe is not None
    data = json.dumps(message).encode()
    pipe.write(len(data).to_bytes(4, "little") + data)
    pipe.flush()


def _receive(pipe: IO[bytes] | None, timeout_s: float) -> Any:
    assert pipe is not None
    deadline = time.monotonic() + timeout_s
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            piece = os.read(pipe.fileno(), 1 << 16)
            if not piece:
                raise EOFError("the child is gone")
            data += piece
    return json.loads(data[4:])
