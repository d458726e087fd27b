"""An `AsyncEngine` whose engine is a process of its own, watched and restarted.

The child is started with one end of a socketpair and an inherited page of shared memory (the
pulse); everything between the two is JSON in frames (channel.py). Three things end a child: it
dies (the socket closes, noticed at once), it says that it failed, or it hangs (watchdog.py): then
its stacks are written to stderr and it is killed. Requests in flight end with EngineDeadError, and
a new child is started after a pause, at most `max_restarts` times in `restart_window_s`. Weights in
the named store stay, so that a restart attaches to them instead of reading the checkpoint.

What it does not do: load or compute anything in this process.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import psutil

from jaxmoe.common.errors import CapacityError, EngineDeadError, JaxMoeError, RequestError
from jaxmoe.common.fields import rules, shown
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.admission import QueueBounds
from jaxmoe.engine.async_engine import EngineInfo, EngineStatus, PrefillProgress
from jaxmoe.engine.channel import READ_BYTES, FrameReader, frame
from jaxmoe.engine.codec import MAX_ID_CHARS, ChannelError
from jaxmoe.engine.mailboxes import Mailboxes
from jaxmoe.engine.messages import (
    AbortRequest,
    Configure,
    Event,
    Failed,
    Fatal,
    Message,
    Stage,
    Started,
    Stop,
)
from jaxmoe.engine.pulse import Pulse
from jaxmoe.engine.watchdog import Patience, Watchdog
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.weights.shared_store import Hold, remove_unused

_log = logging.getLogger(__name__)
# -P: the working directory is no place to import from.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "jaxmoe.engine.engine_process")


@dataclasses.dataclass(frozen=True)
class Supervision:
    """max_restarts in restart_window_s: more, and the engine stays dead. pauses_s: before the
    first, second ... restart of a window. check_s: between looks at the pulse. dump_s: given to a
    hanging child to write its stacks. stop_s: given to a closing child to abort requests, and
    again to end by itself; together less than the 2 s that a service manager is promised.
    """

    patience: Patience = Patience()
    max_restarts: int = 3
    restart_window_s: float = 600.0
    pauses_s: tuple[float, ...] = (0.0, 2.0, 10.0)
    check_s: float = 0.5
    dump_s: float = 1.0
    stop_s: float = 0.6


class ProcessEngine:
    """Make it on the event loop that will use it; loading begins at once, in the child.

    command: the child's command line, for tests; two descriptors are added to it.
    """

    def __init__(
        self,
        config: EngineConfig,
        supervision: Supervision | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._supervision = supervision or Supervision()
        self._command = command
        self._loop = asyncio.get_running_loop()
        bounds = QueueBounds(config.max_queued_requests, config.max_queued_tokens)
        self._mailboxes = Mailboxes(bounds, self._abort_from_anywhere)
        self._status = EngineStatus("loading", "starting the engine process")
        self._info: EngineInfo | None = None
        self._child: _Child | None = None
        self._closing = False
        self._hold: Hold | None = None
        self._restarts: collections.deque[float] = collections.deque()
        self._num_restarts = 0
        self._last_stats: dict[str, float] = {}
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise self._unavailable()
        return self._info

    @property
    def pid(self) -> int | None:
        """Of the child there is now."""
        return self._child.process.pid if self._child is not None else None

    def status(self) -> EngineStatus:
        if self._status.state == "draining":
            return self._mailboxes.draining_status()
        return self._status

    def stats(self) -> Mapping[str, float]:
        """The child's figures as of its last step, and how often it was restarted."""
        if self._child is not None:
            self._last_stats = self._child.stats() or self._last_stats
        return self._last_stats | {"engine_restarts_total": float(self._num_restarts)}

    async def wait_ready(self) -> None:
        """Returns when requests are taken; raises EngineDeadError when they never will be."""
        while self._status.state in ("loading", "restarting"):
            await asyncio.sleep(0.01)
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
        """See AsyncEngine; what can be refused without the engine is refused at once."""
        child = self._child
        if child is None or self._status.state != "ready":
            raise self._unavailable()
        for name, text in (("request_id", request_id), ("cache_salt", cache_salt)):
            _check_text(name, text)
        return self._mailboxes.ask(
            self.info, request_id, prompt_token_ids, params, cache_salt, child.send
        )

    async def abort(self, request_id: str) -> None:
        self._abort(request_id)

    async def close(self, drain_s: float = 0.0) -> None:
        """See AsyncEngine. The child is gone when this returns, also where it is cancelled."""
        self._closing = True
        try:
            if self._status.state == "ready":
                self._status = EngineStatus("draining")
                self._mailboxes.begin_drain()
                await self._mailboxes.wait_empty(drain_s)
                for request_id in self._mailboxes.request_ids():
                    self._abort(request_id)
                await self._mailboxes.wait_empty(self._supervision.stop_s)
            if self._child is not None:
                self._child.send(Stop())
                await self._child.wait_end(self._supervision.stop_s)
        finally:
            end = asyncio.create_task(self._end())
            try:
                await asyncio.shield(end)
            except asyncio.CancelledError:
                await end
                raise

    async def _end(self) -> None:
        """Neither a child nor its memory is left."""
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._child is not None:
            await self._child.kill()
            self._child = None
        self._release_store()
        self._status = EngineStatus("dead", error="closed")
        self._fail_all("the engine was closed")

    def _abort(self, request_id: str) -> None:
        if self._child is not None and len(request_id) <= MAX_ID_CHARS:
            self._child.send(AbortRequest(request_id))

    def _abort_from_anywhere(self, request_id: str) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, request_id)

    def _unavailable(self) -> JaxMoeError:
        status = self._status
        if status.state == "dead":
            return EngineDeadError(f"the engine is dead: {status.error}")
        stage = f" ({status.stage})" if status.stage else ""
        return CapacityError(f"the engine is {status.state}{stage}; try again later")

    def _fail_all(self, why: str) -> None:
        self._mailboxes.fail_all(lambda: EngineDeadError(why))

    async def _supervise(self) -> None:
        """One child after the other, until there is no hope or `close`."""
        try:
            while True:
                why, hopeless = await self._run_child()
                if self._closing:
                    return
                _log.error("the engine ended: %s", why)
                pause_s = None if hopeless else self._next_pause()
                if pause_s is None:
                    self._release_store()
                    self._status = EngineStatus("dead", error=why)
                    self._fail_all(f"the engine died: {why}")
                    return
                stage = "starting the engine process again"
                self._status = EngineStatus("restarting", stage, error=why)
                self._fail_all(f"the engine died and is being restarted: {why}")
                self._num_restarts += 1
                await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.exception("the supervisor failed")
            self._status = EngineStatus("dead", error=f"{type(error).__name__}: {error}")
            self._fail_all(f"the engine's supervisor failed: {error}")

    def _next_pause(self) -> float | None:
        """How long to wait before a restart; None when there were too many."""
        s, now = self._supervision, time.monotonic()
        while self._restarts and now - self._restarts[0] > s.restart_window_s:
            self._restarts.popleft()
        if len(self._restarts) >= s.max_restarts:
            return None
        self._restarts.append(now)
        return s.pauses_s[min(len(self._restarts), len(s.pauses_s)) - 1]

    async def _run_child(self) -> tuple[str, bool]:
        """Why the child ended, and whether another one would end the same way."""
        try:
            child = await _Child.start(self._loop, self._command, self._on_message)
        except OSError as error:  # no process or descriptor to be had; there may be one later
            return f"its process could not be started: {error}", False
        self._child = child
        options = {name: getattr(self._config, name) for name in rules(EngineConfig)}
        if options["shared_weights"] is None:
            options["shared_weights"] = True
        child.send(Configure(options))
        try:
            hang = await self._watch(child)
        except asyncio.CancelledError:
            raise  # `close` sees to the child
        if hang is not None:
            _log.error("the engine hangs: %s; its stacks follow on stderr", hang)
            # Whoever waits is answered before the child gets its time to say where it is.
            self._status = EngineStatus("restarting", "ending a hanging engine", error=hang)
            self._fail_all(f"the engine hangs and is being restarted: {hang}")
            await child.dump_stacks(self._supervision.dump_s)
        elif not self._closing:
            self._status = EngineStatus("restarting", "clearing away the engine process")
            # Its end can take a while (a core dump, gigabytes to give back); nobody waits for that.
            words = await child.last_words()
            self._status = dataclasses.replace(self._status, error=words)
            self._fail_all(f"the engine died: {words}")
        never_ready = self._info is None
        fatal = child.fatal
        code = await child.kill()
        self._child = None
        if hang is not None:
            return hang, False
        if fatal is not None:
            # What a first start refuses, the next would refuse again.
            return fatal.message, never_ready and fatal.kind != "dead"
        return child.broken or _exit_words(code), False

    async def _watch(self, child: _Child) -> str | None:
        """Returns when the child has ended (None) or hangs (in words)."""
        watchdog = Watchdog(self._supervision.patience, time.monotonic())
        while not await child.wait_end(self._supervision.check_s):
            pulse = child.pulse
            now = time.monotonic()
            if watchdog.hung(
                now,
                pending=len(self._mailboxes) > 0,
                steps=pulse.steps,
                compiling=pulse.compiling,
                longest_step_s=pulse.longest_step_s,
                cpu_s=child.cpu_s() if pulse.compiling else 0.0,
            ):
                return (
                    f"{len(self._mailboxes)} requests wait and no step was done for "
                    f"{watchdog.silent_s(now):.1f} s (the longest took {pulse.longest_step_s:.1f})"
                )
        return None

    def _on_message(self, message: Message) -> None:
        if isinstance(message, (Delta, PrefillProgress, Failed)):
            events: list[Event] = [message]
            self._mailboxes.deliver(events)
        elif isinstance(message, Stage):
            if self._status.state in ("loading", "restarting"):
                self._status = dataclasses.replace(
                    self._status, stage=message.stage, percent=message.percent
                )
        elif isinstance(message, Started):
            self._info = message.info
            self._hold_store(message.info.store_name)
            if not self._closing:
                self._status = EngineStatus("ready", percent=100.0)

    def _hold_store(self, name: str | None) -> None:
        """Keeps the weights while there is no child that does."""
        if name is None or (self._hold is not None and self._hold.name == name):
            return
        self._drop_hold()
        try:
            self._hold = Hold(name)
        except OSError as error:
            _log.warning("the shared weights %s will not outlive the engine: %s", name, error)

    def _release_store(self) -> None:
        """Lets the weights go, and what a child has filled that died before it was ready: nobody
        holds that. Only where there is no child.
        """
        self._drop_hold()
        if self._config.shared_weights is not False:
            for name in remove_unused():
                _log.info("removed %s: shared weights that nobody used", name)

    def _drop_hold(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release(remove=True)


class _Child(asyncio.BufferedProtocol):
    """One engine process and the front's end of its socket."""

    def __init__(self, process: subprocess.Popen[bytes], pulse: Pulse, on_message: Any) -> None:
        self.process = process
        self.pulse = pulse
        self.fatal: Fatal | None = None
        self.broken: str | None = None  # why its messages could not be read
        self._on_message = on_message
        self._stat_names: tuple[str, ...] = ()
        self._reader = FrameReader()
        self._received = memoryview(bytearray(READ_BYTES))  # as in Channel.receive
        self._transport: asyncio.WriteTransport | None = None
        self._ended = asyncio.Event()
        self._gone = False  # the process is, and what belonged to it is given back

    @classmethod
    async def start(
        cls, loop: asyncio.AbstractEventLoop, command: Sequence[str], on_message: Any
    ) -> _Child:
        ours, theirs = socket.socketpair()
        pulse = Pulse.create()
        with theirs:
            fds = (theirs.fileno(), pulse.fd)
            # Not in a thread: it takes milliseconds, and nobody may be left with half a child.
            try:
                process = subprocess.Popen[bytes](
                    [*command, *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL
                )
            except BaseException:
                ours.close()
                pulse.close()
                raise
        child = cls(process, pulse, on_message)
        ours.setblocking(False)
        try:
            await loop.create_connection(lambda: child, sock=ours)
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            pulse.close()
            raise
        return child

    def send(self, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def stats(self) -> dict[str, float]:
        return {} if self._gone else self.pulse.stats(self._stat_names)

    def cpu_s(self) -> float:
        """What its process has used of the CPU; 0 once it is gone."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    async def wait_end(self, timeout_s: float) -> bool:
        """Whether the child's end of the socket closed in that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    async def last_words(self) -> str:
        """Why it ended, as far as that can be told within 0.3 s: its process may be still at it,
        writing its memory to a file or giving it back.
        """
        if self.fatal is None and self.broken is None:
            for _ in range(30):
                code = self.process.poll()
                if code is not None:
                    return _exit_words(code)
                await asyncio.sleep(0.01)
            return "its process ends"
        return self.broken or (self.fatal.message if self.fatal else "")

    async def dump_stacks(self, timeout_s: float) -> None:
        self._signal(signal.SIGUSR1)
        await self.wait_end(timeout_s)

    async def kill(self) -> int:
        """Its exit code; certainly gone afterwards. May be called again."""
        self._signal(signal.SIGKILL)
        code = await asyncio.to_thread(self.process.wait)
        if not self._gone:
            self._gone = True
            if self._transport is not None:
                self._transport.close()
            self.pulse.close()
        return code

    def _signal(self, number: signal.Signals) -> None:
        # Not os.kill after a poll: another thread may be taking its exit code.
        self.process.send_signal(number)

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message in self._reader.feed(self._received[:nbytes]):
                if isinstance(message, Fatal):
                    self.fatal = message
                elif isinstance(message, Started):
                    self._stat_names = message.stat_names
                self._on_message(message)
        except ChannelError as error:
            self.broken = str(error)
            self._ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()


def _check_text(name: str, text: str | None) -> None:
    """What goes into a message must be text that JSON has, and not endless."""
    if text is None:
        return
    if not isinstance(text, str) or not 0 < len(text) <= MAX_ID_CHARS:
        raise RequestError(
            f"{name}: got {shown(text)}, wanted a text of 1 to {MAX_ID_CHARS} characters"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name}: got {shown(text)}, wanted valid Unicode") from None


def _exit_words(code: int) -> str:
    if code < 0:
        try:
            return f"its process was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"its process was ended by signal {-code}"
    return f"its process ended with exit code {code}"
