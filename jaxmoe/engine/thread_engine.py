"""An `AsyncEngine` whose engine runs in a thread of the same process.

For tests, for servers that want one process only, and the pattern the engine process follows. A
crash of native code takes the whole process along; process_engine.py is the one that survives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from jaxmoe.common.errors import CapacityError, EngineDeadError, JaxMoeError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.admission import QueueBounds
from jaxmoe.engine.async_engine import EngineInfo, EngineStatus, PrefillProgress
from jaxmoe.engine.driver import HOLD_S, Driver
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.mailboxes import Mailboxes
from jaxmoe.engine.messages import AbortRequest, Event, Stop
from jaxmoe.engine.ready import OnStage, Ready
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams

_log = logging.getLogger(__name__)


class ThreadEngine:
    """Loads in the background (`status` says how far), then serves until `close`.

    Args:
        make: loads the engine, in the engine's thread; reports stages and percent.
        bounds: of the queue.
        hold_s: how long tokens may wait for those of the next step (driver.py).
    """

    def __init__(
        self,
        make: Callable[[OnStage], Ready],
        bounds: QueueBounds | None = None,
        hold_s: float = HOLD_S,
    ) -> None:
        self._status = EngineStatus("loading", "starting")
        # Of every change of the status that depends on the one before: both threads make such.
        self._changing = threading.Lock()
        self._info: EngineInfo | None = None
        self._driver: Driver | None = None
        self._hold_s = hold_s
        self._stats: Mapping[str, float] = {}
        self._mailboxes = Mailboxes(bounds or QueueBounds(), self._post_abort)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, config: EngineConfig) -> ThreadEngine:
        """The engine that `config` describes; returns at once."""

        def make(on_stage: OnStage) -> Ready:
            from jaxmoe.engine.start import start  # loads the native extension

            started = start(config, on_stage)
            started.measure_read_ceiling()
            return Ready(started.engine, started.info, started.close)

        bounds = QueueBounds(config.max_queued_requests, config.max_queued_tokens)
        return cls(make, bounds)

    @classmethod
    def on_engine(
        cls,
        engine: Engine,
        *,
        model: str = "model",
        bounds: QueueBounds | None = None,
        hold_s: float = HOLD_S,
    ) -> ThreadEngine:
        """Drives an engine that was made elsewhere, and leaves it alone at the end."""
        return cls(lambda _: Ready(engine, engine.info(model)), bounds, hold_s)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise self._unavailable()
        return self._info

    def status(self) -> EngineStatus:
        if self._status.state == "draining":
            return self._mailboxes.draining_status()
        return self._status

    def stats(self) -> Mapping[str, float]:
        return self._stats

    async def wait_ready(self) -> None:
        """Returns when requests are taken; raises EngineDeadError if loading failed."""
        while self._status.state == "loading":
            await asyncio.sleep(0.005)
        if self._status.state != "ready":
            raise self._unavailable()

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta | PrefillProgress]:
        """See AsyncEngine; what can be refused without the engine's thread is refused at once."""
        driver = self._driver
        if driver is None or self._status.state != "ready":
            raise self._unavailable()
        self._loop = asyncio.get_running_loop()
        return self._mailboxes.ask(
            self.info, request_id, prompt_token_ids, params, cache_salt, driver.post
        )

    async def abort(self, request_id: str) -> None:
        self._post_abort(request_id)

    async def close(self, drain_s: float = 0.0) -> None:
        if self._status.state == "ready":
            self._status = EngineStatus("draining")
            self._mailboxes.begin_drain()
            await self._mailboxes.wait_empty(drain_s)
            for request_id in self._mailboxes.request_ids():
                self._post_abort(request_id)
            await self._mailboxes.wait_empty(10.0)  # a step under way has to end first
        with self._changing:
            # Loading cannot be interrupted; the thread ends with it.
            self._status = EngineStatus("dead", error="closed")
            if self._driver is not None:
                self._driver.post(Stop())
        self._mailboxes.fail_all(lambda: EngineDeadError("the engine was closed"))
        await asyncio.to_thread(self._thread.join)

    def _post_abort(self, request_id: str) -> None:
        if self._driver is not None:
            self._driver.post(AbortRequest(request_id))

    def _unavailable(self) -> JaxMoeError:
        status = self._status
        if status.state == "dead":
            return EngineDeadError(f"the engine is dead: {status.error}")
        stage = f" ({status.stage})" if status.stage else ""
        return CapacityError(f"the engine is {status.state}{stage}; try again later")

    # The rest runs in the engine's thread.

    def _run(self, make: Callable[[OnStage], Ready]) -> None:
        try:
            ready = make(self._report_stage)
        except Exception as error:
            _log.error("the engine did not start: %s", error)
            self._die(error)
            return
        try:
            self._serve(ready)
        except Exception as error:
            _log.exception("the engine died")
            self._die(error)
        finally:
            ready.close()

    def _serve(self, ready: Ready) -> None:
        def note(stats: dict[str, float]) -> None:
            self._stats = stats

        note(ready.engine.stats())
        with self._changing:
            if self._status.state == "dead":  # closed meanwhile
                return
            self._info = ready.info
            self._driver = Driver(ready.engine, self._emit, on_stats=note, hold_s=self._hold_s)
            self._status = EngineStatus("ready", percent=100.0)
        self._driver.run()

    def _report_stage(self, stage: str, percent: float) -> None:
        with self._changing:
            if self._status.state == "loading":
                self._status = EngineStatus("loading", stage, percent)

    def _emit(self, events: list[Event]) -> None:
        self._call_front(lambda: self._mailboxes.deliver(events))

    def _die(self, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        with self._changing:
            if self._status.state != "dead":
                self._status = EngineStatus("dead", error=message)
        self._call_front(
            lambda: self._mailboxes.fail_all(lambda: EngineDeadError(f"the engine died: {message}"))
        )

    def _call_front(self, call: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it all who listen
                self._loop.call_soon_threadsafe(call)
