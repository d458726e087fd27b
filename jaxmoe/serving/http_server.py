"""The one file that knows the HTTP server: hypercorn's HTTP/1.1 protocol on asyncio's sockets.

hypercorn parses and frames; accepting is done here, since three things are wanted that its own
loop does not do: a bound on open connections, an end of clients that leave their answer unread,
and a stop that does not wait for idle connections (from Python 3.12 `Server.wait_closed` waits for
all of them). HTTP/2 is not offered: one request a connection keeps disconnects unmistakable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData

from jaxmoe.common.errors import ConfigError
from jaxmoe.serving.asgi import App, Receive, Scope, Send
from jaxmoe.serving.server_config import ServerConfig

_log = logging.getLogger(__name__)
_BACKLOG = 512
# What a connection may hold of an answer that its client has not taken yet.
_WRITE_BUFFER_BYTES = 256 << 10
_SOCKET_BUFFER_BYTES = 256 << 10  # the kernel's part; by itself it grows to megabytes
# What asyncio asks for in one read. By itself it takes a block of 256 KiB from the heap for each
# and gives most of it back, which leaves holes between the objects that live on: the front grew by
# 2 MiB an hour. Most requests are a few KiB.
_READ_BYTES = 16 << 10
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


class HttpServer:
    """Serves `app` on the address of `config` from `start` to `stop`."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._server: asyncio.Server | None = None
        self._context = WorkerContext(None)
        self._connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._hypercorn = _hypercorn_config(config)
        self.port = 0

    async def start(self) -> None:
        """Listens; ConfigError where the address cannot be had."""
        config = self._config
        try:
            self._server = await asyncio.start_server(
                self._connected, config.host, config.port, backlog=_BACKLOG, reuse_address=True
            )
        except OSError as e:
            raise ConfigError(
                f"host, port: cannot listen on {config.host}:{config.port}: {e.strerror or e}; "
                "choose another --port, or 0 for a free one"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Takes no more connections, closes idle ones, and cuts the rest after `grace_s`."""
        if self._server is not None:
            self._server.close()
        await self._context.terminated.set()  # idle connections close by themselves
        if self._connections:
            await asyncio.wait(list(self._connections), timeout=grace_s)
        for task, writer in list(self._connections.items()):
            writer.transport.abort()
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections), timeout=1.0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= self._config.max_connections:
            writer.write(_BUSY)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await writer.wait_closed()
            _cut_unread(writer)
            return
        self._connections[task] = writer
        writer.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        # asyncio's selector transport has no setter for it; another transport ignores it.
        writer.transport.max_size = _READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        sock = writer.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # a token's event must not wait for the next one
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        try:
            await _Connection(
                self._config.write_timeout_s,
                ASGIWrapper(_http1_only(self._app)),  # pyright: ignore[reportArgumentType]
                asyncio.get_running_loop(),
                self._hypercorn,
                self._context,
                {},  # pyright: ignore[reportArgumentType]
                reader,
                writer,
            )
        except Exception:
            _log.exception("a connection failed")
        finally:
            self._connections.pop(task, None)


class _Connection(TCPServer):
    """hypercorn's connection, cut when its client does not read.

    Closing a transport waits for its buffer to be taken, without a bound; so each way to close
    starts one. A write has its own, but waits only where much is unread.
    """

    def __init__(self, write_timeout_s: float, *args: Any) -> None:
        super().__init__(*args)
        self._write_timeout_s = write_timeout_s
        self._cut: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            if self._cut is not None:
                self._cut.cancel()

    async def _close(self) -> None:
        self._cut_later()
        await super()._close()

    async def _initiate_server_close(self) -> None:
        self._cut_later()
        await super()._initiate_server_close()

    def _cut_later(self) -> None:
        if self._cut is None:
            self._cut = self.loop.call_later(self._write_timeout_s, _cut_unread, self.writer)

    async def _read_data(self) -> None:
        await super()._read_data()
        # Else a connection that its client closed is kept until its idle time is over.
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                self.writer.write(event.data)
                if self.writer.transport.get_write_buffer_size() <= _WRITE_BUFFER_BYTES:
                    if not self.writer.transport.is_closing():
                        return  # `drain` would not wait; a timer for every token costs as much
                async with asyncio.timeout(self._write_timeout_s):
                    await self.writer.drain()
            except (ConnectionError, RuntimeError, TimeoutError):
                self.writer.transport.abort()
                await self.protocol.handle(Closed())


def _cut_unread(writer: asyncio.StreamWriter) -> None:
    # A transport that has written everything is closed already, or is about to be.
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()


def _hypercorn_config(config: ServerConfig) -> Config:
    out = Config()
    out.h11_max_incomplete_size = config.max_header_kb << 10
    out.keep_alive_timeout = config.header_timeout_s  # also for headers: idle is "no request yet"
    out.include_server_header = False
    out.accesslog = None
    out.errorlog = logging.getLogger("hypercorn.error")
    out.max_app_queue_size = 16
    return out


def _http1_only(app: App) -> App:
    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["http_version"] not in ("1.0", "1.1"):
            headers = [(b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 505, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await app(scope, receive, send)

    return checked
