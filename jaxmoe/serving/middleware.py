"""What every request passes first, as plain ASGI: an id, a log line, the host, the key, the body.

In this order from the outside: `Cors` (pages of other origins; outside of what answers errors, for
a page cannot read an answer without its headers), `Requests` (id, log, last resort for errors),
`Hosts` (DNS rebinding), `Keys` (deny by default), `Bodies` (size and deadline; the body is read
whole before a handler runs). Nothing here looks at routes but at `scope["path"]`, so no route can
be forgotten.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping

from jaxmoe.serving.asgi import App, Headers, Message, Receive, Scope, Send, header, send_error
from jaxmoe.serving.errors import ApiError, as_api_error, internal_error

PUBLIC_PATHS = frozenset({"/health"})
_log = logging.getLogger(__name__)
_access = logging.getLogger("jaxmoe.serving.access")
# Names of headers that a page asks leave for: clients send many of their own (x-stainless-*).
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2048}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Requests:
    """Gives each request an id (the client's x-request-id if it is a plain one), logs its end, and
    answers whatever was raised before the response began.

    observe: told method, path, status and seconds of each request.
    """

    def __init__(self, app: App, observe: Callable[[str, str, int, float], None]) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        given = header(scope, b"x-request-id") or ""
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope["request_id"] = request_id
        start_s, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),  # Anthropic's clients read this one
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            error = as_api_error(e)
            if error is None:
                _log.exception("request %s: an error inside the server", request_id)
                error = internal_error(request_id)
            if not status:
                await send_error(scope, send_with_id, error)
        finally:
            seconds = time.monotonic() - start_s
            status = status or 499  # the client left before there was an answer; nginx's number
            self._observe(scope["method"], scope["path"], status, seconds)
            _access.info(
                "%s %s %d",
                scope["method"],
                scope["path"][:200],
                status,
                extra={
                    "request_id": request_id,
                    "status": status,
                    "seconds": round(seconds, 4),
                    "key": scope.get("key_name"),
                },
            )


class Hosts:
    """Answers only to the given Host names; None answers to all."""

    def __init__(self, app: App, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._hosts is not None:
            host = (header(scope, b"host") or "").lower()
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if name not in self._hosts:
                raise ApiError(
                    403,
                    f"Host: got {name[:100]!r}, which this server does not answer to; name it in "
                    "--allowed_hosts",
                    code="host_not_allowed",
                )
        await self._app(scope, receive, send)


class Cors:
    """Lets web pages of the given origins use the API. Without any, browsers keep pages out by
    themselves: JSON bodies need a preflight, and that is refused.

    Preflights are answered here, so they have no id and no log line. They may ask for any headers:
    what a page may do is a matter of its origin and of the key.
    """

    def __init__(self, app: App, origins: tuple[str, ...]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin") if scope["type"] == "http" else None
        allowed = origin is not None and ("*" in self._origins or origin in self._origins)
        if not allowed or origin is None:
            await self._app(scope, receive, send)
            return
        cors: Headers = [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"origin"),
        ]
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method"):
            wanted = header(scope, b"access-control-request-headers") or ""
            if _HEADER_NAMES.fullmatch(wanted):
                cors.append((b"access-control-allow-headers", wanted.encode()))
            cors += [
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
                (b"access-control-max-age", b"600"),
            ]
            await send({"type": "http.response.start", "status": 204, "headers": cors})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *cors]
            await send(message)

        await self._app(scope, receive, send_cors)


class Keys:
    """Wants an API key for every path that is not public.

    `keys`: by name. Hashes are compared, in constant time and all of them, so that neither a key's
    bytes nor its length shows in the time taken. Notes the key's name in scope["key_name"].
    """

    def __init__(self, app: App, keys: Mapping[str, str], public: frozenset[str]) -> None:
        self._app = app
        self._hashes = [(name, _hash(key)) for name, key in keys.items()]
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._hashes and scope["path"] not in self._public:
            scope["key_name"] = self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        given = header(scope, b"x-api-key")
        authorization = header(scope, b"authorization") or ""
        if authorization[:7].lower() == "bearer ":
            given = authorization[7:].strip()
        if not given:
            raise ApiError(
                401,
                "this server wants an API key: send it as Authorization: Bearer KEY or as "
                "x-api-key",
                code="missing_api_key",
            )
        hashed, found = _hash(given), None
        for name, known in self._hashes:
            if hmac.compare_digest(hashed, known):
                found = name
        if found is None:
            raise ApiError(401, "the API key is not one of this server's", code="invalid_api_key")
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Bodies:
    """Reads the body whole, within a size and a time, and hands it on in one piece.

    max_bytes: of one body; max_buffered_bytes: of all that are being read or handled; timeout_s:
    for the whole body, so that dripping bytes does not extend it.
    """

    def __init__(
        self, app: App, *, max_bytes: int, max_buffered_bytes: int, timeout_s: float
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self._timeout_s = timeout_s
        self._buffered_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        return self._buffered_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > self._max_bytes:
            raise self._too_large(declared)
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if taken + count > self._max_bytes:
                raise self._too_large(f"more than {self._max_bytes}")
            if self._buffered_bytes + count > self._max_buffered_bytes:
                raise ApiError(
                    429,
                    f"request bodies of {self._buffered_bytes} bytes are in work, at most "
                    f"{self._max_buffered_bytes} may be (max_buffered_mb); try again later",
                    code="queue_full",
                    retry_after_s=1.0,
                )
            taken += count
            self._buffered_bytes += count

        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    body = await _read(receive, take)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body took more than {self._timeout_s:g} s to arrive (body_timeout_s)",
                    code="body_timeout",
                ) from None
            if body is None:  # the client left
                return

            async def receive_body() -> Message:
                nonlocal body
                if body is None:
                    return await receive()
                given, body = body, None  # whoever has parsed it need not keep it
                return {"type": "http.request", "body": given, "more_body": False}

            await self._app(scope, receive_body, send)
        finally:
            self._buffered_bytes -= taken

    def _too_large(self, given: str) -> ApiError:
        return ApiError(
            413,
            f"the body has {given} bytes, wanted at most {self._max_bytes} (max_body_mb)",
            code="body_too_large",
        )


async def _read(receive: Receive, take: Callable[[int], None]) -> bytes | None:
    body = bytearray()  # a list of small pieces would take many times their bytes
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunk = message.get("body", b"")
        take(len(chunk))
        body += chunk
        if not message.get("more_body", False):
            return bytes(body)
