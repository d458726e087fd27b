"""The front's half of an engine: one mailbox a request, filled by events, read by its iterator.

Everything here runs on one event loop and never waits for an engine. What it does not do: know
where the engine runs.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from jaxmoe.common.errors import JaxMoeError, RequestError
from jaxmoe.engine.admission import QueueBounds
from jaxmoe.engine.async_engine import EngineInfo, EngineStatus, PrefillProgress
from jaxmoe.engine.checks import check_request
from jaxmoe.engine.deltas import merge
from jaxmoe.engine.messages import AddRequest, Event, Failed
from jaxmoe.request import Delta, TokenLogprob
from jaxmoe.sampling_params import SamplingParams

# A reader this far behind gets tokens in larger pieces, so that what waits for it stays small.
_MERGE_FROM = 32


class Mailbox(AsyncIterator[Delta | PrefillProgress]):
    """The iterator of one request. Closing, cancelling or dropping it early calls `leave`."""

    def __init__(self, request_id: str, prompt_tokens: int, leave: Callable[[Mailbox], None]):
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.started = False  # whether the engine has begun to compute it
        self._leave = leave
        self._items: collections.deque[Delta | PrefillProgress] = collections.deque()
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._error: JaxMoeError | None = None
        self.done = False  # nothing more will arrive
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Delta | PrefillProgress) -> None:
        if isinstance(item, Delta):
            item = self._with_prompt_logprobs(item)
        # Only the latest progress is of interest.
        if isinstance(item, PrefillProgress) and self._items:
            if isinstance(self._items[-1], PrefillProgress):
                self._items.pop()
        elif isinstance(item, Delta) and len(self._items) >= _MERGE_FROM:
            item = self._merged(item)
        self._items.append(item)
        self.done = self.done or (isinstance(item, Delta) and item.output is not None)
        self._wake()

    def _merged(self, delta: Delta) -> Delta:
        """The delta joined with the last one of its completion that still waits, which is taken
        out. Completions move past each other that way, which is nobody's order.
        """
        for at in range(len(self._items) - 1, -1, -1):
            last = self._items[at]
            if isinstance(last, Delta) and last.index == delta.index:
                merged = merge(last, delta)
                if merged is None:
                    return delta
                del self._items[at]
                return merged
        return delta

    def _with_prompt_logprobs(self, delta: Delta) -> Delta:
        """The output has them too; between processes they come with the first delta only."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        if delta.output is None or self._prompt_logprobs is None:
            return delta
        output = dataclasses.replace(delta.output, prompt_logprobs=self._prompt_logprobs)
        return dataclasses.replace(delta, output=output)

    def fail(self, error: JaxMoeError) -> None:
        self._error, self.done = error, True
        self._wake()

    async def __anext__(self) -> Delta | PrefillProgress:
        while not self._items:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.done:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._close()
                raise
            finally:
                self._waiter = None
        return self._items.popleft()

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        self._items.clear()
        self._error = None
        if not self.done:
            self.done = True
            self._leave(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __del__(self) -> None:
        self._close()


class Mailboxes:
    """All unfinished requests of a front.

    abort: told the ids of requests whose iterator was left early; from any thread, since the
    garbage collector may find a dropped iterator in any.
    """

    def __init__(self, bounds: QueueBounds, abort: Callable[[str], None]) -> None:
        self._bounds = bounds
        self._abort = abort
        self._to_drain = 1
        # Weak: whoever iterates owns the mailbox, and dropping it ends the request.
        self._open: weakref.WeakValueDictionary[str, Mailbox] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def queued(self) -> tuple[int, int]:
        """Requests that wait for their first step, and their prompt tokens."""
        waiting = [m.prompt_tokens for m in self._open.values() if not m.started]
        return len(waiting), sum(waiting)

    def open(self, request_id: str, prompt_tokens: int) -> Mailbox:
        """A mailbox for a new request. Raises CapacityError (the queue is full), RequestError."""
        if request_id in self._open:
            raise RequestError(f"request_id: {request_id!r} is in use; choose another")
        self._bounds.check(*self.queued, prompt_tokens)
        mailbox = Mailbox(request_id, prompt_tokens, self._leave)
        self._open[request_id] = mailbox
        return mailbox

    def ask(
        self,
        info: EngineInfo,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        cache_salt: str | None,
        send: Callable[[AddRequest], None],
    ) -> Mailbox:
        """Checks a request by what is known of the engine, opens its mailbox and sends it off.
        Raises as `open`, and RequestError for what cannot be served.
        """
        check_request(info, prompt_token_ids, params)
        mailbox = self.open(request_id, len(prompt_token_ids))
        send(AddRequest(request_id, tuple(prompt_token_ids), params, cache_salt))
        return mailbox

    def deliver(self, events: Iterable[Event]) -> None:
        """Hands events to their requests; those of requests that were left are dropped."""
        for event in events:
            mailbox = self._open.get(event.request_id)
            if mailbox is None:
                continue
            if isinstance(event, Failed):
                mailbox.fail(event.error())
            else:
                mailbox.started = True
                mailbox.put(event)
            if mailbox.done:
                self._open.pop(event.request_id, None)

    def fail_all(self, error: Callable[[], JaxMoeError]) -> None:
        """Ends every request with an error of its own."""
        for mailbox in list(self._open.values()):
            mailbox.fail(error())
        self._open.clear()

    def request_ids(self) -> list[str]:
        return list(self._open)

    def begin_drain(self) -> None:
        self._to_drain = max(len(self._open), 1)

    def draining_status(self) -> EngineStatus:
        """How much of what there was at `begin_drain` is done."""
        left = len(self._open)
        percent = 100.0 * (1 - left / self._to_drain)
        return EngineStatus("draining", f"{left} requests left", percent)

    async def wait_empty(self, timeout_s: float) -> None:
        """Returns when no request is left, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        # Polled: the end of a drain is no hot path, and dropped mailboxes leave silently.
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _leave(self, mailbox: Mailbox) -> None:
        if self._open.get(mailbox.request_id) in (mailbox, None):
            self._open.pop(mailbox.request_id, None)
            self._abort(mailbox.request_id)
