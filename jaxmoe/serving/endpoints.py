"""Endpoints as ASGI: parse and check the body, take a place, run the handler, send its reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from jaxmoe.common.errors import JaxMoeError
from jaxmoe.serving import replies
from jaxmoe.serving.asgi import Receive, Scope, Send, header
from jaxmoe.serving.errors import ApiError, as_api_error
from jaxmoe.serving.fields import Body, Endpoint
from jaxmoe.serving.replies import JsonReply, Reply
from jaxmoe.serving.state import Call, ServerState

Handler = Callable[[ServerState, Call], Awaitable[Reply]]
# Checking takes about 0.1 s a megabyte of token ids, in which nobody else would be answered. Less
# than this takes some milliseconds, and need not wait for a thread that long texts may be keeping.
_CHECKED_ON_LOOP_BYTES = 64 << 10


class PostEndpoint:
    """A route that takes a JSON body of the table's fields. An ASGI application."""

    def __init__(self, state: ServerState, endpoint: Endpoint, handler: Handler) -> None:
        self._state = state
        self._endpoint: Endpoint = endpoint
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_s = time.monotonic()
        state = self._state
        raw = (await receive()).get("body", b"")  # whole: middleware.Bodies read it
        deadline_s = received_s + self._timeout_s(scope)
        key = scope.get("key_name")
        try:
            with state.admission.enter(key):
                if len(raw) > _CHECKED_ON_LOOP_BYTES:
                    body = await state.off_loop(self._check, scope, raw)
                else:
                    body = self._check(scope, raw)
                del raw
                call = Call(scope["request_id"], key, body, received_s)
                reply = await self._reply(call, receive, deadline_s)
                if reply is None:
                    return
                if isinstance(reply, JsonReply):
                    await replies.send_reply(send, reply)
                    return
                await replies.send_stream(
                    scope,
                    receive,
                    send,
                    reply,
                    ping_s=state.config.ping_interval_s,
                    deadline_s=deadline_s,
                    engine_is_up=self._engine_is_up,
                )
        except JaxMoeError as e:
            error = as_api_error(e, engine_is_up=self._engine_is_up())
            if error is None:
                raise
            raise error from e
        finally:
            state.metrics.request.observe(time.monotonic() - received_s)

    def _check(self, scope: Scope, raw: bytes) -> Body:
        return self._state.checker.check(self._endpoint, _json(scope, raw))

    async def _reply(self, call: Call, receive: Receive, deadline_s: float) -> Reply | None:
        """None where the client left before there was one."""
        left_s = deadline_s - time.monotonic()
        work = _within(left_s, self._handler(self._state, call))
        return await replies.until_disconnect(receive, work)

    def _engine_is_up(self) -> bool:
        return self._state.engine.status().state == "ready" and not self._state.draining

    def _timeout_s(self, scope: Scope) -> float:
        longest = self._state.config.request_timeout_s
        given = header(scope, b"x-request-timeout")
        if given is None:
            return longest
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise ApiError(400, f"x-request-timeout: got {given[:40]!r}, wanted seconds above 0")
        return min(seconds, longest)


async def _within(seconds: float, work: Awaitable[Reply]) -> Reply:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise ApiError(408, "the request's time is over", code="request_timeout") from None


def _json(scope: Scope, raw: bytes) -> Any:
    kind = (header(scope, b"content-type") or "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            415, f"Content-Type: got {kind[:100]!r}, wanted application/json", code="content_type"
        )
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}", code="invalid_json") from None
