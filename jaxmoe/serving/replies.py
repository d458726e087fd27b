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
    events = reply.events
    opened = False
    step: asyncio.Future[bytes] | None = None

    async def open_() -> None:
        nonlocal opened
        opened = True
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        if reply.opening:
            await put(reply.opening)

    async def put(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    try:
        while True:
            if step is None:
                step = asyncio.ensure_future(anext(events))
            left = deadline_s - time.monotonic()
            wait_s = min(ping_s if opened else _OPEN_AFTER_S, max(left, 0.0))
            await asyncio.wait({step, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return
            if step.done():
                try:
                    data = step.result()
                except StopAsyncIteration:
                    break
                step = None
                if not opened:
                    await open_()
                await put(data)
            elif left <= 0:
                raise ApiError(408, "the request's time is over", code="request_timeout")
            elif not opened:
                await open_()
            else:
                await put(_PING)
        if not opened:
            await open_()
    except Exception as e:
        error = as_api_error(e, engine_is_up=engine_is_up())
        if error is None:
            _log.exception("request %s: an error inside the server", scope["request_id"])
            error = internal_error(scope["request_id"])
        if not opened:
            raise error from e
        await put(reply.error_event(error))
    finally:
        await _end(gone, *([] if step is None else [step]))
        await events.aclose()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


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
