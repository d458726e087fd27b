"""The engine process: loads, then steps an engine for the front at the other end of a socket.

Started by process_engine.py with two inherited descriptors, the socket and the pulse. It lives as
long as the front does: when the socket closes it ends at once. Signals of the terminal or of a
service manager are the front's to answer, so they are ignored here. SIGUSR1 writes the Python
stacks of all threads to stderr.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmoe.common import logs
from jaxmoe.engine.channel import Channel
from jaxmoe.engine.codec import ChannelError
from jaxmoe.engine.driver import Driver
from jaxmoe.engine.messages import (
    AbortRequest,
    AddRequest,
    Configure,
    Event,
    Fatal,
    Message,
    Stage,
    Started,
    Stop,
    error_kind,
)
from jaxmoe.engine.pulse import Pulse
from jaxmoe.engine.ready import OnStage, Ready

_log = logging.getLogger(__name__)
Load = Callable[[Mapping[str, Any], OnStage, Callable[[bool], None]], Ready]
FAILED = 3  # exit code after a Fatal message


def load(
    options: Mapping[str, Any], on_stage: OnStage, on_compile: Callable[[bool], None]
) -> Ready:
    """The real engine of an `EngineConfig`."""
    from jaxmoe.config.engine_config import EngineConfig
    from jaxmoe.engine.start import start  # loads the native extension

    started = start(EngineConfig.of(options), on_stage)
    started.step.on_compile = on_compile
    on_stage("measuring the memory", 100.0)
    started.measure_read_ceiling()
    return Ready(started.engine, started.info, started.close)


def serve(sock: socket.socket, pulse: Pulse, load: Load = load) -> int:
    """Runs until told to stop; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    channel = Channel(sock)
    messages = channel.receive()
    configure = next(messages, None)
    if not isinstance(configure, Configure):
        return FAILED
    commands = _Commands()
    threading.Thread(target=_receive, args=(messages, commands), daemon=True).start()
    try:
        ready = load(
            configure.options,
            lambda stage, percent: channel.send([Stage(stage, percent)]),
            pulse.set_compiling,
        )
        engine = ready.engine

        def emit(events: list[Event]) -> None:
            for request_id in channel.send_events(events):
                driver.post(AbortRequest(request_id))

        driver = Driver(engine, emit, lambda: pulse.beat(engine.longest_step_s), pulse.set_stats)
        commands.to(driver)
        pulse.set_stats(engine.stats())
        channel.send([Started(ready.info, tuple(engine.stats()))])
        driver.run()
        ready.close()
        return 0
    except Exception as error:
        _log.exception("the engine process ends")
        message = str(error) if error_kind(error) != "other" else f"{type(error).__name__}: {error}"
        channel.send([Fatal(error_kind(error), message)])
        return FAILED


class _Commands:
    """Holds commands until there is a driver; only a Stop can come before."""

    def __init__(self) -> None:
        self._driver: Driver | None = None

    def to(self, driver: Driver) -> None:
        self._driver = driver

    def post(self, command: AddRequest | AbortRequest | Stop) -> None:
        if self._driver is not None:
            self._driver.post(command)
        elif isinstance(command, Stop):
            os._exit(0)  # loading cannot be interrupted otherwise


def _receive(messages: Iterator[Message], commands: _Commands) -> None:
    """In a thread of its own, so that the front's end is noticed whatever the engine is doing."""
    try:
        for message in messages:
            if not isinstance(message, (AddRequest, AbortRequest, Stop)):
                raise ChannelError(f"the front sent a {type(message).__name__}")
            commands.post(message)
    except (ChannelError, OSError) as error:
        _log.error("the front's messages cannot be read: %s", error)
    # Without a front there is nobody to work for, and no step is worth finishing.
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Arguments: form and level of the log, if not text and info; then the two descriptors."""
    args = sys.argv[1:] if argv is None else argv
    *log, socket_fd, pulse_fd = args
    form, level = log or ("text", str(logging.INFO))
    logs.set_up(form, int(level))
    return serve(socket.socket(fileno=int(socket_fd)), Pulse(int(pulse_fd)))


if __name__ == "__main__":
    code = main()
    # Threads of native libraries must not hold up an end that is decided.
    sys.stderr.flush()
    os._exit(code)
