"""An engine process on the step computable by hand. Prompts that begin with a command word make it
crash, fail, hang, compile or take its time. Run it as a program: `fake_engine_child.py FD FD`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxmoe.common.errors import CapacityError  # noqa: E402
from jaxmoe.engine import channel, engine_process  # noqa: E402
from jaxmoe.engine.pulse import Pulse  # noqa: E402
from jaxmoe.engine.ready import Ready  # noqa: E402
from jaxmoe.weights import shared_store  # noqa: E402
from support import fake_step  # noqa: E402

TEXT = b"0123456789" * 3
COMMAND = (sys.executable, __file__)


def fill(name):
    """Half of a store, held as its users hold it."""
    fd = os.open(shared_store.DIRECTORY / name.removeprefix("/"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.write(fd, b"half")


def load(options, on_stage, on_compile):
    if options["model"] == "too large":
        raise CapacityError("no memory for it")
    on_stage("loading weights", 50.0)
    if options["model"].startswith("fill and"):
        how, _, name = options["model"].removeprefix("fill and ").partition(" ")
        fill(name)
        if how == "fail":
            raise CapacityError("no memory for the rest")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    if options["model"] == "slow to load" or options["model"].startswith("fill and wait"):
        time.sleep(60)

    most = channel.MAX_FRAME_BYTES

    def script(prompt: bytes) -> bytes:
        if prompt.startswith(b"die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith(b"segv"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if prompt.startswith(b"raise"):
            raise ValueError("boom")
        if prompt.startswith(b"hang"):
            time.sleep(3600)
        if prompt.startswith(b"compile") and not step.compiled:
            step.compiled = True
            on_compile(True)
            end = time.monotonic() + 3
            while time.monotonic() < end:  # a compiler that works, and is no hang
                pass
            on_compile(False)
        if prompt.startswith(b"slow"):
            time.sleep(0.05)
        if prompt.startswith(b"large"):
            channel.MAX_FRAME_BYTES = 400
        else:
            channel.MAX_FRAME_BYTES = most
        if prompt.startswith(b"garbage"):
            sock.sendall(b"\x05\0\0\0[1,2]")
        return TEXT

    engine, step = fake_step.make_engine(script)
    step.compiled = False
    return Ready(engine, engine.info("fake", "a report"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sock = socket.socket(fileno=int(sys.argv[1]))
    os._exit(engine_process.serve(sock, Pulse(int(sys.argv[2])), load))
