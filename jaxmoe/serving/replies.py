"""Sending what a handler returns: JSON, or a stream of server-sent events that never falls silent.

A stream is opened before the prompt is computed: as soon as the engine has taken the request, or
after a moment in which it would have refused it. From then on silence is filled with comment
lines, errors become events, and a client that leaves ends the work, wherever it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from jaxmoe.serving.asgi import Receive, Scope, Send, dumps, send_json
from jaxmoe.serving.errors import ApiError, as_api_error, internal_error

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
# What a refusal may take before the response is opened; an engine process answers in milliseconds.
_OPEN_AFTER_S = 0.25
_PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back
]


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + dumps(value) + b"\n\n"


def openai_error_event(error: ApiError) -> bytes:
    return event(error.openai()) + DONE


@dataclasses.dataclass(frozen=True)
class JsonReply:
    value: Any
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamReply:
    """opening: sent when the response is opened. error_event: how an error looks after that."""

    events: AsyncGenerator[bytes]
    opening: bytes = b""
    error_event: Callable[[ApiError], bytes] = openai_error_event


Reply = JsonReply | StreamReply


async def until_disconnect(receive: Receive, work: Awaitable[_T]) -> _T | None:
    """The result of `work`; None where the client left by then, and the work was cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            return task.result()
        # Both may end in one turn of the loop. The disconnect comes once, so that whoever went on
        # with the result would wait for it in vain.
        if task.done() and not task.cancelled() and task.exception() is None:
            await _discard(task.result())
        return None
    finally:
        await _end(task, gone)


async def send_stream(
    scope: Scope,
    receive: Receive,
    send: Send,
    reply: StreamReply,
    *,
    ping_s: float,
    deadline_s: float,
    engine_is_up: Callable[[], bool],
) -> None:
    """Sends a stream to its end. deadline_s: monotonic; an error event ends the stream there.

    Raises ApiError where the request was refused before the response was opened.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    stream = _Stream(send, reply)
    # One task writes everything, so that an event costs no task and no timer of its own.
    pump = asyncio.ensure_future(stream.pump())
    try:
        while True:
            now = time.monotonic()
            silent_s = now - stream.sent_s
            wait_s = ping_s - silent_s if stream.opened else _OPEN_AFTER_S - silent_s
            wait_s = min(max(wait_s, 0.0), max(deadline_s - now, 0.0))
            done, _ = await asyncio.wait(
                {pump, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
            )
            if gone in done:
                return
            if pump in done:
                pump.result()
                break
            now = time.monotonic()
            if now >= deadline_s:
                raise ApiError(408, "the request's time is over", code="request_timeout")
            if not stream.busy:
                if not stream.opened:
                    await stream.open()
                elif now - stream.sent_s >= ping_s:
                    await stream.put(_PING)
            else:
                stream.sent_s = now  # the client does not read; the connection sees to that
    except Exception as e:
        error = as_api_error(e, engine_is_up=engine_is_up())
        if error is None:
            _log.exception("request %s: an error inside the server", scope["request_id"])
            error = internal_error(scope["request_id"])
        await _end(pump)
        if not stream.opened:
            raise error from e
        await stream.put(reply.error_event(error))
    finally:
        await _end(gone, pump)
        await reply.events.aclose()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Stream:
    """What a stream has sent so far. sent_s: when it last sent something; monotonic. Both the pump
    and whoever fills silence send, in turns.
    """

    def __init__(self, send: Send, reply: StreamReply) -> None:
        self._send = send
        self._reply = reply
        self.opened = False
        self._sending = asyncio.Lock()
        self.sent_s = time.monotonic()

    async def pump(self) -> None:
        """Sends all events."""
        async for data in self._reply.events:
            if not self.opened:
                await self.open()
            await self.put(data)
        if not self.opened:
            await self.open()

    async def open(self) -> None:
        self.opened = True
        start = {"type": "http.response.start", "status": 200, "headers": list(_HEADERS)}
        async with self._sending:
            await self._send(start)
            if self._reply.opening:
                await self._put(self._reply.opening)

    async def put(self, data: bytes) -> None:
        async with self._sending:
            await self._put(data)

    async def _put(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.sent_s = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether something is being sent."""
        return self._sending.locked()


async def send_reply(send: Send, reply: JsonReply) -> None:
    await send_json(send, 200, reply.value, reply.headers)


async def _discard(result: Any) -> None:
    if isinstance(result, StreamReply):
        await result.events.aclose()


async def _disconnected(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            # Whatever it raised on its way out is of no interest any more.
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
