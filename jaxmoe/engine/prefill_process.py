"""A process that computes long prompts for an engine in another one: the prefill worker of
`disaggregate="process"`.

Started by remote_prefill.py with two inherited descriptors, a socket and the shared pages. It
attaches to the named memory that the engine's experts are in, has the other weights and pages for
one sequence of its own, and leaves each layer's pages in the shared ones (kv_cache/shared_pages.py)
while the next layer is computed. It lives as long as the engine does: when the socket closes it
ends at once.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from jaxmoe.common import logs
from jaxmoe.common.errors import CapacityError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.engine import compile_cache
from jaxmoe.engine.channel import Channel
from jaxmoe.engine.codec import ChannelError
from jaxmoe.engine.directory import model_path, read_directory
from jaxmoe.engine.engine_process import FAILED
from jaxmoe.engine.long_prompts import LongPrompts, start_streaming
from jaxmoe.engine.messages import (
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
    error_kind,
)
from jaxmoe.engine.prefill_worker import Streamed
from jaxmoe.engine.ready import OnStage
from jaxmoe.engine.start import cache_layout, load_weights
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.kv_cache import handoff
from jaxmoe.kv_cache.handoff import Block, Cache
from jaxmoe.kv_cache.shared_pages import SharedPages
from jaxmoe.models.decoder import cache_spec

_log = logging.getLogger(__name__)


class Prompts:
    """Computes one after the other, in the calling thread; `post` is for another one.

    Args:
        own: page arrays of every layer, for one sequence of any admitted length.
        pages: shared with the engine.
    """

    def __init__(
        self, slp: Streamed, own: list[Cache], pages: SharedPages, channel: Channel, page_size: int
    ) -> None:
        self._slp, self._own, self._pages, self._channel = slp, own, pages, channel
        self._page_size = page_size
        self._changed = threading.Condition()
        self._next: BeginPrompt | None = None
        self._dropped = -1  # this prompt and all before it

    def post(self, command: BeginPrompt | DropPrompt) -> None:
        with self._changed:
            if isinstance(command, BeginPrompt):
                self._next = command
            else:
                self._dropped = max(self._dropped, command.job)
            self._changed.notify_all()

    def run(self) -> None:
        """Without end. Raises where a failure took the worker's own pages with it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                given, self._next = self._next, None
            assert given is not None
            failure = None
            try:
                self._compute(given)
            except Exception as error:
                _log.error("a prompt of %d tokens failed: %s", len(given.token_ids), error)
                failure = str(error) or type(error).__name__
            self._channel.send([PromptEnded(given.job, failure)])
            if any(a.is_deleted() for cache in self._own for a in cache):
                raise CapacityError("the worker's pages were lost in a step that failed")

    def _compute(self, given: BeginPrompt) -> None:
        size, end = self._page_size, given.start + len(given.token_ids)
        known = -(-given.start // size)
        # In order, whatever the pages of the engine's caches are.
        row = StepRow(given.token_ids, given.start, range(given.num_pages), 0, None)  # pyright: ignore
        for layer, checksum in enumerate(given.checksums):
            block = self._pages.read(layer, 0, known, checksum)
            self._own[layer] = handoff.put(self._own[layer], range(known), jax.device_put(block))
        first = given.start // size
        written = range(first, -(-end // size))
        run = self._slp.layers(row, lambda: self._own)
        ready: tuple[int, Block] | None = None
        try:
            for done in run:
                if self._dropped >= given.job:
                    return
                if ready is not None:
                    self._deliver(given.job, written, *ready)
                ready = done - 1, handoff.take(self._own[done - 1], written)
        finally:
            run.close()
        if ready is not None and self._dropped < given.job:
            self._deliver(given.job, written, *ready)

    def _deliver(self, job: int, written: range, layer: int, block: Block) -> None:
        checksum = self._pages.write(layer, written.start, len(written), block)
        self._channel.send([LayerDone(job, layer, checksum)])


@dataclasses.dataclass
class _Made:
    """What `start_streaming` makes in the place of a worker."""

    slp: Streamed
    own: list[Cache]

    def close(self) -> None:
        self.slp.close()


def load(
    config: EngineConfig, pages_fd: int, channel: Channel, on_stage: OnStage
) -> tuple[Prompts, LongPrompts]:
    """Attaches to the weights, and tells the engine what it has to know."""
    directory = read_directory(model_path(config))
    model = directory.model_config
    device = jax.local_devices(backend="cpu")[0]
    compile_cache.enable(config.cache_path)
    layout = cache_layout(config, model)
    spec = cache_spec(model, config.compute_dtype)
    pages = SharedPages(pages_fd, spec, layout.pages_per_sequence, layout.page_size)
    runtime = CpuRuntime(num_threads=config.num_threads, isa=config.isa)
    loaded = load_weights(config, directory, runtime, on_stage)
    made: list[_Made] = []

    def make(slp: Streamed, own: list[Cache]) -> _Made:
        made.append(_Made(slp, own))
        return made[0]

    parts, notes = start_streaming(
        config, model, layout, device, runtime, loaded, list, on_stage,
        decode_device=device, make_worker=make,
    )  # fmt: skip
    if parts is None:
        raise CapacityError(f"disaggregate: process, but {'; '.join(notes) or 'nothing streams'}")
    prompts = Prompts(made[0].slp, made[0].own, pages, channel, layout.page_size)
    route, ((ring, _),) = parts.route, parts.rings
    ready = PrefillReady(
        loaded.report.shared_name or "",
        made[0].slp.max_tokens,
        made[0].slp.num_layers,
        ring.total_bytes,
        route.pass_s,
        route.streamed_token_s,
        route.chunked_token_s,
        route.source,
        parts.report,
    )
    channel.send([ready])
    return prompts, parts


def serve(sock: socket.socket, pages_fd: int) -> int:
    """Runs until the engine is gone; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    channel = Channel(sock)
    messages = channel.receive()
    configure = next(messages, None)
    if not isinstance(configure, Configure):
        return FAILED
    try:
        prompts, parts = load(
            EngineConfig.of(configure.options),
            pages_fd,
            channel,
            lambda stage, percent: channel.send([Stage(stage, percent)]),
        )
        receiving = threading.Thread(target=_receive, args=(messages, prompts, parts), daemon=True)
        receiving.start()
        prompts.run()
    except Exception as error:
        _log.exception("the prefill process ends")
        message = str(error) if error_kind(error) != "other" else f"{type(error).__name__}: {error}"
        channel.send([Fatal(error_kind(error), message)])
    return FAILED


def _receive(messages: Iterator[Message], prompts: Prompts, parts: LongPrompts) -> None:
    """In a thread of its own, so that the engine's end is noticed whatever is being computed."""
    try:
        for message in messages:
            if isinstance(message, SetPace):
                for ring, _ in parts.rings:
                    ring.set_pace(message.bytes_per_s)
            elif isinstance(message, BeginPrompt | DropPrompt):
                prompts.post(message)
            else:
                raise ChannelError(f"the engine sent a {type(message).__name__}")
    except (ChannelError, OSError) as error:
        _log.error("the engine's messages cannot be read: %s", error)
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Arguments: level of the log, then the two descriptors."""
    level, socket_fd, pages_fd = sys.argv[1:] if argv is None else argv
    logs.set_up("text", int(level))
    return serve(socket.socket(fileno=int(socket_fd)), int(pages_fd))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
