"""The prefill worker as a process of its own (prefill_process.py), seen from the engine.

Both are attached to one named memory with the experts; a layer's pages come through memory that
the two share, with a checksum (kv_cache/shared_pages.py), everything else as messages on a
socketpair. If the process dies, its prompt fails alone, decode goes on, prompts are computed in
chunks, and another process is started, which attaches to the same experts; too many deaths, and it
stays at chunks.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax

from jaxmoe.common.errors import CapacityError, JaxMoeError
from jaxmoe.common.fields import rules
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.engine.channel import Channel
from jaxmoe.engine.codec import ChannelError
from jaxmoe.engine.messages import (
    ERRORS,
    BeginPrompt,
    Configure,
    DropPrompt,
    Fatal,
    LayerDone,
    Message,
    PrefillReady,
    PromptEnded,
    SetPace,
    Stage,
)
from jaxmoe.ffi.device_driver import Device
from jaxmoe.kv_cache import handoff
from jaxmoe.kv_cache.handoff import Block, Cache
from jaxmoe.kv_cache.shared_pages import SharedPages

_log = logging.getLogger(__name__)
COMMAND = (sys.executable, "-P", "-m", "jaxmoe.engine.prefill_process")
# As of engine processes: one that cannot live is not started for ever.
MAX_RESTARTS = 3
# Layers read out of the shared pages that the engine has not taken in: as in prefill_worker.py.
_LAYERS_AHEAD = 4
_GRACE_S = 1.0  # for a process whose socket is closed to be gone, so that its exit code is its own


@dataclasses.dataclass(eq=False)
class _Job:
    """A row whose pages are those of the decode caches, and the known beginning of every layer."""

    job_id: int
    row: StepRow
    beginning: list[Block]
    known: int  # pages of it
    stopped: bool = False
    computed: bool = False
    failure: BaseException | None = None
    received: int = 0  # layers
    arrived: collections.deque[tuple[int, Block]] = dataclasses.field(
        default_factory=collections.deque
    )
    taken: int = 0  # layers that the decode caches have


class RemotePrefill:
    """Has the methods of `PrefillWorker`, for the same threads, and those of a ring that the
    throttle needs. Starting it waits until prompts are taken.

    Args:
        config: the engine's. num_threads: of the process.
        pages: shared; closed with this.
        caches: the decode caches as they are now.
        store: name of the experts' memory, which the process has to have attached to.

    on_usable: may be set; told False when the process is lost and True when there is another one;
    from a thread.

    Raises: what the process says; CapacityError where it ends without a word.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_threads: int,
        pages: SharedPages,
        caches: Callable[[], list[Cache]],
        decode_device: Device,
        store: str,
        on_stage: Callable[[str, float], None] = lambda stage, percent: None,
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        options = {name: getattr(config, name) for name in rules(EngineConfig)}
        options |= dict(num_threads=num_threads, show_progress=False, profile=None, warm_up=False)
        self._options, self._command = options, command
        self._pages, self._caches, self._decode_device = pages, caches, decode_device
        self._page_size, self._store = config.page_size, store
        self._changed = threading.Condition()
        self._ids = itertools.count()
        self._job: _Job | None = None  # the engine's
        self._at: int | None = None  # what the process is at
        self._pending: _Job | None = None  # to be begun when it is at nothing
        self._there = self._closing = self._woken = False
        self._pace = 0.0
        self._num_restarts = 0
        self._gone: str | None = None  # why there will be no process any more
        self.handed_over = 0  # layers, since the start
        self.on_usable: Callable[[bool], None] = lambda usable: None
        messages = self._start(on_stage)
        self._thread = threading.Thread(target=self._main, args=(messages,), name="remote prefill")
        self._thread.daemon = True
        self._thread.start()

    usable = True  # whatever happens there, the decode caches are whole

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def max_tokens(self) -> int:
        return self.ready.max_tokens

    @property
    def num_layers(self) -> int:
        return self.ready.num_layers

    @property
    def total_bytes(self) -> int:
        return self.ready.total_bytes

    def set_pace(self, bytes_per_s: float) -> None:
        """Of streaming from now on, in processes to come too."""
        self._pace = bytes_per_s
        self._send(SetPace(bytes_per_s))

    def begin(self, row: StepRow) -> None:
        """Starts with the row's tokens; what was under way is dropped."""
        self.stop()
        known = -(-row.start // self._page_size)
        beginning: list[Block] = []
        if known:
            # Read now, in order with the steps around it.
            beginning = [handoff.take(cache, row.pages[:known]) for cache in self._caches()]
        job = _Job(next(self._ids), row, beginning, known)
        with self._changed:
            self._job = job
            if self._gone is not None:
                job.failure = ValueError(f"there is no prefill process: {self._gone}")
                return
            self._pending = job
        self._begin_pending()

    def poll(self) -> float:
        """As `PrefillWorker.poll`. Raises: ValueError where the prompt could not be computed."""
        job = self._job
        assert job is not None, "nothing has begun"
        while True:
            with self._changed:
                if not job.arrived:
                    failure, computed = job.failure, job.computed
                    break
                layer, block = job.arrived.popleft()
                self._changed.notify_all()
            caches, written = self._caches(), self._written(job.row)
            pages = job.row.pages[written.start : written.stop]
            caches[layer] = handoff.put(caches[layer], pages, block)
            job.taken += 1
            self.handed_over += 1
        if failure is not None:
            self._job = None
            raise failure
        if computed and job.taken == self.ready.num_layers:
            self._job = None
            return 1.0
        return job.taken / (self.ready.num_layers + 1)

    def wait(self, timeout_s: float) -> None:
        job = self._job
        with self._changed:
            self._changed.wait_for(
                lambda: self._woken or job is None or job.arrived or job.failure or job.computed,
                timeout_s,
            )
            self._woken = False

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Drops the prompt under way, if any: nothing of it reaches the decode caches from now on.
        The layer being computed is finished first, by the process.
        """
        with self._changed:
            job, self._job, self._pending = self._job, None, None
            if job is not None:
                job.stopped = True
                job.arrived.clear()
            self._changed.notify_all()
        if job is not None:
            self._send(DropPrompt(job.job_id))

    def close(self) -> None:
        """Ends the process."""
        self.stop()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            process = self._process
        process.kill()
        self._thread.join()
        self._pages.close()

    def _written(self, row: StepRow) -> range:
        """Of the row's pages, those with a position that it computes."""
        end = row.start + len(row.token_ids)
        return range(row.start // self._page_size, -(-end // self._page_size))

    def _send(self, message: Message) -> None:
        try:
            self._channel.send([message])
        except OSError:
            pass  # it is gone; who receives notices, and says so

    def _begin_pending(self) -> None:
        """Hands over the prompt that waits, if the process is there and at nothing."""
        with self._changed:
            job = self._pending
            if job is None or not self._there or self._at is not None:
                return
            self._pending, self._at = None, job.job_id
        # It writes nothing into the shared pages until it is told to.
        row = job.row
        checksums = tuple(
            self._pages.write(layer, 0, job.known, block)
            for layer, block in enumerate(job.beginning)
        )
        job.beginning.clear()
        tokens = tuple(row.token_ids)
        self._send(BeginPrompt(job.job_id, row.start, tokens, len(row.pages), checksums))

    # The rest runs in a thread of its own, but for the first start.

    def _start(self, on_stage: Callable[[str, float], None]) -> Iterator[Message]:
        """Starts the process and waits until it is ready: its further messages."""
        ours, theirs = socket.socketpair()
        level = str(logging.getLogger().getEffectiveLevel())
        with theirs:
            fds = (theirs.fileno(), self._pages.fd)
            process = subprocess.Popen(
                [*self._command, level, *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL
            )
        with self._changed:
            self._socket, self._process, self._channel = ours, process, Channel(ours)
            if self._closing:
                process.kill()
        try:
            messages = self._channel.receive()
            self._channel.send([Configure(self._options)])
            for message in messages:
                if isinstance(message, Stage):
                    on_stage(message.stage, message.percent)
                elif isinstance(message, Fatal):
                    raise ERRORS[message.kind](f"the prefill process: {message.message}")
                elif isinstance(message, PrefillReady):
                    if message.store != self._store:
                        raise CapacityError(
                            f"the prefill process has its experts in {message.store or 'private'} "
                            f"memory, wanted {self._store}"
                        )
                    self.ready = message
                    break
            else:
                raise ConnectionResetError
            self._channel.send([SetPace(self._pace)])
        except OSError:  # the socket is broken: it is ending
            raise CapacityError(
                f"the prefill process ended with code {self._end(_GRACE_S)}"
            ) from None
        except BaseException:
            self._end()
            raise
        with self._changed:
            self._there = True
        return messages

    def _end(self, grace_s: float = 0.0) -> int:
        """Nothing is left of the process: its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if grace_s:
                self._process.wait(grace_s)
        self._process.kill()
        code = self._process.wait()
        self._socket.close()
        return code

    def _main(self, messages: Iterator[Message]) -> None:
        while True:
            why, grace_s = "", _GRACE_S
            try:
                for message in messages:
                    self._take(message)
            except OSError:
                pass
            except (ValueError, JaxMoeError) as error:
                why, grace_s = f": {error}", 0.0
            code = self._end(grace_s)
            with self._changed:
                self._there, self._at = False, None
                if self._closing:
                    return
                job = self._job
                # What waited for it has not begun: the next process may.
                if job is not None and job is not self._pending and not job.computed:
                    job.failure = ValueError(f"the prefill process ended with code {code}{why}")
                self._changed.notify_all()
            self.on_usable(False)
            self._num_restarts += 1
            try:
                if self._num_restarts > MAX_RESTARTS:
                    raise CapacityError(f"it was started again {MAX_RESTARTS} times")
                _log.error("the prefill process ended with code %d%s; starting another", code, why)
                messages = self._start(lambda stage, percent: None)
            except JaxMoeError as error:
                with self._changed:
                    self._gone = str(error)
                    if self._closing:
                        return
                    if self._pending is not None:
                        self._pending.failure = ValueError(f"there is no prefill process: {error}")
                        self._pending = None
                    self._changed.notify_all()
                _log.error("prompts are computed in chunks: no prefill process: %s", error)
                return
            self.on_usable(True)
            self._begin_pending()

    def _take(self, message: Message) -> None:
        job = self._job
        if isinstance(message, LayerDone):
            if job is None or job.job_id != message.job:
                return  # of one that was dropped
            if message.layer != job.received:
                raise ChannelError(f"layer {message.layer} came, wanted {job.received}")
            written = self._written(job.row)
            read = self._pages.read(message.layer, written.start, len(written), message.checksum)
            block = jax.device_put(read, self._decode_device)
            job.received += 1
            with self._changed:
                self._changed.wait_for(
                    lambda: job.stopped or self._closing or len(job.arrived) < _LAYERS_AHEAD
                )
                if not job.stopped:
                    job.arrived.append((message.layer, block))
                self._changed.notify_all()
        elif isinstance(message, PromptEnded):
            with self._changed:
                if message.job == self._at:
                    self._at = None
                if job is not None and job.job_id == message.job:
                    if message.failure is not None:
                        job.failure = ValueError(message.failure)
                    else:
                        job.computed = True
                self._changed.notify_all()
            self._begin_pending()
        elif isinstance(message, Fatal):
            raise ERRORS[message.kind](message.message)
        else:
            raise ChannelError(f"the prefill process sent a {type(message).__name__}")
