"""A grammar is tried in a process of its own before it may enter the one that serves.

llguidance bounds most of what a grammar can cost, not all: some take minutes, some gigabytes, and
deep recursion overflows the stack, which ends a process. The child compiles a grammar and computes
its first two masks, under limits of time, memory and stack that are tighter than the parent's;
where it does not survive that, it is killed and the request refused. Messages are JSON behind a
length of 4 bytes, over pipes.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import IO, Any

from jaxmoe.common.errors import CapacityError

START_TIMEOUT_S = 60.0  # Python, the library and 150,000 tokens: about 2 s
CHECK_TIMEOUT_S = 5.0  # usual schemas take 10 ms
MEMORY_BYTES = 4 << 30  # address space; 150,000 tokens take 0.5 GB of it
STACK_BYTES = 2 << 20  # threads of the parent have 8 MiB
CPU_S = 10  # should the parent be gone


class GrammarChecker:
    """Owns the child, started at first use and again after it was lost. Thread-safe: one grammar
    is tried at a time.

    Args:
        describe: the vocabulary as `child` wants it; called when a child starts.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]]) -> None:
        self._describe = describe
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], Any] = lambda: None

    def check(self, grammar: str) -> str | None:
        """What is wrong with a grammar in llguidance's form, or None. Raises CapacityError where
        the child cannot start.
        """
        with self._lock:
            child = self._started()
            try:
                _send(child.stdin, grammar)
                return _receive(child.stdout, CHECK_TIMEOUT_S)
            except TimeoutError:
                self._end()
                return f"did not compile within {CHECK_TIMEOUT_S:g} s; simplify it"
            except (EOFError, OSError):
                self._end()
                return "takes too much memory or is nested too deeply; simplify it"

    def close(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end()
        try:
            child = _spawn()
            self._child, self._stop = child, weakref.finalize(self, _kill, child)
            _send(child.stdin, self._describe())
            _receive(child.stdout, START_TIMEOUT_S)
        except (TimeoutError, EOFError, OSError) as e:
            self._end()
            raise CapacityError(
                f"the process that tries grammars did not start ({e!r}); free memory or processes"
            ) from None
        return child

    def _end(self) -> None:
        self._stop()
        self._child = None


def _spawn() -> subprocess.Popen[bytes]:
    code = "from jaxmoe.sampling.grammar_check import child; child()"
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
    data = b""
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


def describe(
    tokens: Sequence[bytes], special_ids: Sequence[int], eos: Sequence[int], limits: dict[str, Any]
) -> dict[str, Any]:
    """The first message to a child."""
    return {
        "tokens": [base64.b85encode(t).decode() for t in tokens],
        "special": list(special_ids),
        "eos": list(eos),
        "limits": limits,
    }


def child() -> None:
    """The child: a vocabulary, then grammars for ever."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this one
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    import resource

    import llguidance

    def receive() -> Any:
        head = sys.stdin.buffer.read(4)
        return json.loads(sys.stdin.buffer.read(int.from_bytes(head, "little"))) if head else None

    message = receive()
    vocabulary = _Words(message)
    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(vocabulary), eos_token=message["eos"]
    )
    limits = llguidance.LLParserLimits(**message["limits"])
    _send(sys.stdout.buffer, None)
    while (grammar := receive()) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        _send(sys.stdout.buffer, first_masks(tokenizer, grammar, limits, message["eos"])[1])


def first_masks(tokenizer: Any, grammar: str, limits: Any, eos: Sequence[int]) -> tuple[Any, Any]:
    """Compiles a grammar and computes its first two masks, which show most of what is too complex.

    Returns:
        The matcher, at its beginning, and what is wrong, or None.
    """
    import llguidance

    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return matcher, in_short(matcher.get_error())
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    for token in eos:
        mask &= ~(1 << token)
    if matcher.is_error():
        return matcher, in_short(matcher.get_error())
    if not mask:
        return matcher, "no text of this model's tokens but the empty one matches"
    copy = matcher.deep_copy()
    copy.consume_token((mask & -mask).bit_length() - 1)
    copy.compute_bitmask()
    return matcher, in_short(copy.get_error()) if copy.is_error() else None


def in_short(message: str) -> str:
    """The library's message on one line, without its dump of the grammar."""
    words = " ".join(message.split()).replace(" <non-verbose/>", "")
    return (words if len(words) <= 300 else words[:297] + "...") or "the grammar is not usable"


class _Words:
    """A vocabulary that splits texts greedily; only the choice among spellings depends on it."""

    bos_token_id = None

    def __init__(self, message: dict[str, Any]) -> None:
        self.tokens = [base64.b85decode(t) for t in message["tokens"]]
        self.special_token_ids = message["special"]
        self.eos_token_id = message["eos"][0]
        special = set(self.special_token_ids)
        self._ids = {t: i for i, t in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        out, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if (token := self._ids.get(data[at:end])) is not None:
                    out.append(token)
                    break
            else:
                end = at + 1  # a byte that no token has
            at = end
        return out
