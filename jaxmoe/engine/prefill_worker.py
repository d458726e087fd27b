"""The prefill worker: long prompts computed on a device of their own while others are decoded
(paper section 3.3: prefill-decode disaggregation in one node).

It has a thread, a device, the weights beside the routed experts once more (or streams them too),
and page arrays for one sequence; the routed experts stream from the one host store. Every layer's
pages go to the decode device while the next layer is computed (kv_cache/handoff.py). Only the
engine's thread touches the decode caches, for their arrays are donated from step to step: it takes
in what has arrived between two steps (`poll`).

What it does not do: choose prompts (scheduler/), or draw tokens: a prompt's last token is left for
an ordinary prefill.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import jax

from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.device_driver import Device
from jaxmoe.kv_cache import handoff
from jaxmoe.kv_cache.handoff import Block, Cache
from jaxmoe.prefill.slp import SlpPrefill

_log = logging.getLogger(__name__)

# Layers that may lie on the decode device without having been taken in: an engine that is busy with
# a step does not hold the prefill up, and their memory stays small.
_LAYERS_AHEAD = 4


class Streamed(Protocol):
    """What the worker needs of prefill/slp.py."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def layers(
        self, row: StepRow, caches: Callable[[], list[Cache]]
    ) -> Generator[int, None, object]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(eq=False)
class _Job:
    """A row whose pages are those of the decode caches, and the known beginning of every layer."""

    row: StepRow
    beginning: list[Block]
    stopped: bool = False
    computed: bool = False
    failure: BaseException | None = None
    arrived: collections.deque[tuple[int, Block]] = dataclasses.field(
        default_factory=collections.deque
    )
    taken: int = 0  # layers that the decode caches have


class PrefillWorker:
    """One prompt at a time. All methods but `wake` are for the engine's thread.

    Args:
        slp: the programs and the ring of `device`; closed with this.
        own: page arrays of every layer on `device`, for one sequence of any admitted length.
        caches: the decode caches as they are now.
        device, decode_device: where the prompt is computed, and where it is wanted.
    """

    def __init__(
        self,
        slp: SlpPrefill | Streamed,
        own: list[Cache],
        caches: Callable[[], list[Cache]],
        device: Device,
        decode_device: Device,
        *,
        page_size: int,
        layers_ahead: int = _LAYERS_AHEAD,
    ) -> None:
        self._slp, self._own, self._caches = slp, own, caches
        self._device, self._decode_device = device, decode_device
        self._page_size, self._layers_ahead = page_size, layers_ahead
        self._changed = threading.Condition()
        self._next: _Job | None = None  # posted, not begun
        self._job: _Job | None = None  # the engine's
        self._closing = self._woken = False
        self.handed_over = 0  # layers, since the start
        self._thread = threading.Thread(target=self._main, name="prefill", daemon=True)
        self._thread.start()

    @property
    def max_tokens(self) -> int:
        """That one pass over the weights takes."""
        return self._slp.max_tokens

    @property
    def num_layers(self) -> int:
        return self._slp.num_layers

    @property
    def usable(self) -> bool:
        """False after a failure that took the worker's own caches with it."""
        return not any(a.is_deleted() for cache in self._own for a in cache)

    def begin(self, row: StepRow) -> None:
        """Starts with the row's tokens; what was under way is dropped."""
        self.stop()
        beginning: list[Block] = []
        if row.start:
            # Read now, in order with the steps around it; copied while other things are done.
            known = row.pages[: -(-row.start // self._page_size)]
            beginning = [
                handoff.send(handoff.take(cache, known), self._device) for cache in self._caches()
            ]
        with self._changed:
            self._job = self._next = _Job(row, beginning)
            self._changed.notify_all()

    def poll(self) -> float:
        """Takes in what has arrived: which fraction of the prompt is there, 1 at the end.

        Raises: what the prefill raised; the prompt is dropped then, and the next may begin.
        """
        job = self._job
        assert job is not None, "nothing has begun"
        while True:
            with self._changed:
                if not job.arrived:
                    failure, computed = job.failure, job.computed
                    break
                layer, block = job.arrived.popleft()
                self._changed.notify_all()
            caches = self._caches()
            caches[layer] = handoff.put(caches[layer], self._written(job.row), block)
            job.taken += 1
            self.handed_over += 1
        if failure is not None:
            self._job = None
            raise failure
        if computed and job.taken == self._slp.num_layers:
            self._job = None
            return 1.0
        return job.taken / (self._slp.num_layers + 1)

    def wait(self, timeout_s: float) -> None:
        """Until `poll` has something new, `wake` was called, or some time has passed."""
        job = self._job
        with self._changed:
            self._changed.wait_for(
                lambda: self._woken or job is None or job.arrived or job.failure or job.computed,
                timeout_s,
            )
            self._woken = False

    def wake(self) -> None:
        """Ends a `wait`, the present one or the next; from any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Drops the prompt under way, if any: nothing of it reaches the decode caches from now on.
        The layer being computed is finished first, by the worker.
        """
        with self._changed:
            if self._job is not None:
                self._job.stopped = True
                self._job.arrived.clear()
            self._job = self._next = None
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread, and gives the device's memory back."""
        self.stop()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._slp.close()
        self._own.clear()

    def _written(self, row: StepRow) -> Sequence[int]:
        """Of the row's pages, those with a position that it computes."""
        end = row.start + len(row.token_ids)
        return row.pages[row.start // self._page_size : -(-end // self._page_size)]

    # The rest runs in the worker's thread.

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._next is not None)
                if self._closing:
                    return
                job, self._next = self._next, None
            assert job is not None
            try:
                self._compute(job)
            except BaseException as error:
                with self._changed:
                    if not job.stopped:
                        job.failure = error
                    else:
                        _log.info("a prompt that was dropped had failed: %s", error)
                    self._changed.notify_all()

    def _compute(self, job: _Job) -> None:
        row = job.row
        # Its own pages are in order, whatever those of the decode caches are.
        own = dataclasses.replace(row, pages=range(len(row.pages)), slot=0)
        known = own.pages[: -(-row.start // self._page_size)]
        for i, block in enumerate(job.beginning):
            self._own[i] = handoff.put(self._own[i], known, block)
        job.beginning.clear()
        pages = self._written(own)
        run = self._slp.layers(own, lambda: self._own)
        on_its_way: tuple[int, Block] | None = None
        try:
            for done in run:
                if on_its_way is not None and not self._deliver(job, *on_its_way):
                    return
                block = handoff.take(self._own[done - 1], pages)
                on_its_way = done - 1, handoff.send(block, self._decode_device)
        finally:
            run.close()
        if on_its_way is not None and self._deliver(job, *on_its_way):
            with self._changed:
                job.computed = True
                self._changed.notify_all()

    def _deliver(self, job: _Job, layer: int, block: Block) -> bool:
        """Hands a layer to the engine once it has arrived; False where the prompt was dropped."""
        jax.block_until_ready(block)
        with self._changed:
            self._changed.wait_for(
                lambda: job.stopped or self._closing or len(job.arrived) < self._layers_ahead
            )
            if job.stopped or self._closing:
                return False
            job.arrived.append((layer, block))
            self._changed.notify_all()
            return True
