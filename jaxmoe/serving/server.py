"""A server from start to end: listen, load, serve, drain.

The address is listened on before the model is loaded, so that /health and /ready answer from the
first second. SIGTERM (or SIGINT) drains: /ready says 503, new requests are refused, running ones
get `drain_timeout_s`, what is left then ends with finish_reason "abort". A second signal is now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping

from jaxmoe.engine.async_engine import EngineStatus
from jaxmoe.serving.app import make_app
from jaxmoe.serving.http_server import HttpServer
from jaxmoe.serving.state import ServerState

_log = logging.getLogger(__name__)
# After the last completion has ended, its answer still has to be written.
_WRITE_GRACE_S = 1.0
_CLOSE_S = 10.0  # what an engine may take to end: a step under way comes first
# What it may take after a second signal: above twice the 0.6 s (process_engine.py, stop_s) after
# which an engine process is killed, so that its memory is given back.
_HURRY_S = 2.0
_POLL_S = 0.02


class Server:
    """Everything of one server process."""

    def __init__(self, state: ServerState, keys: Mapping[str, str]) -> None:
        self.state = state
        self._http = HttpServer(make_app(state, keys), state.config)
        self._stop = asyncio.Event()
        self._now = asyncio.Event()

    @property
    def url(self) -> str:
        host = self.state.config.host
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self._http.port}"

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Begins to drain; again: stops at once."""
        if self._stop.is_set():
            self._now.set()
        self._stop.set()

    async def run(
        self,
        *,
        signals: bool = True,
        on_listening: Callable[[str], None] = lambda url: None,
        on_status: Callable[[EngineStatus], None] = lambda status: None,
    ) -> int:
        """Serves until it is stopped; the exit code is 1 where the engine died.

        on_listening, on_status: told the URL, and how the engine is whenever that changes.
        """
        if signals:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        await self._http.start()
        self.state.warm_up()
        watch = asyncio.create_task(self._watch(on_status))
        try:
            on_listening(self.url)
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait({stopped, watch}, return_when=asyncio.FIRST_COMPLETED)
            died = watch.done()
            await self._drain(0.0 if died else self.state.config.drain_timeout_s)
            return 1 if died else 0
        finally:
            watch.cancel()
            await self._http.stop(_WRITE_GRACE_S)
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            self.state.close()

    async def _watch(self, on_status: Callable[[EngineStatus], None]) -> None:
        """Tells of changes; returns when the engine is dead for good."""
        last: EngineStatus | None = None
        while True:
            status = self.state.engine.status()
            if status != last:
                last = status
                on_status(status)
            if status.state == "dead" and not self._stop.is_set():
                _log.error("the engine is dead: %s", status.error)
                return
            await asyncio.sleep(_POLL_S)

    async def _drain(self, timeout_s: float) -> None:
        state = self.state
        state.draining = True
        if state.admission.requests:
            _log.info("draining: %d requests in work", state.admission.requests)
        deadline = time.monotonic() + timeout_s
        while state.admission.requests and time.monotonic() < deadline and not self._now.is_set():
            await asyncio.sleep(_POLL_S)
        # Aborts what is left; its streams still get their last event, also after a second signal.
        closing = asyncio.create_task(state.engine.close(0.0))
        end, hurried = time.monotonic() + _CLOSE_S, False
        while time.monotonic() < end and (state.admission.requests or not closing.done()):
            if not hurried and (closing.done() or self._now.is_set()):
                grace_s = _WRITE_GRACE_S if closing.done() else _HURRY_S
                end, hurried = min(end, time.monotonic() + grace_s), True
            await asyncio.sleep(_POLL_S)
        closing.cancel()
        # An engine process is still cleared away then.
        await asyncio.gather(closing, return_exceptions=True)
