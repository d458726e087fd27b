"""Connections that drip, stay silent, do not read, or speak something else."""

import asyncio
import contextlib
import json
import socket

from support.front import run, serving
from support.raw_sockets import connected, until_closed

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@contextlib.asynccontextmanager
async def dripping(writer, data, every_s=0.05):
    async def drip():
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(every_s)

    task = asyncio.create_task(drip())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_body_may_not_drip():
    async def test():
        async with serving(body_timeout_s=0.5) as f, connected(f) as (reader, writer):
            writer.write(
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                "content-length: 1000\r\n\r\n".encode()
            )
            async with dripping(writer, b"a" * 1000):
                answer = await until_closed(reader, 5)
            assert b" 408 " in answer.split(b"\r\n")[0] and b"body_timeout" in answer

    run(test())


def test_headers_may_not_drip_and_idle_connections_close():
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1000

    async def test():
        async with serving(header_timeout_s=0.5) as f, connected(f, 2) as (silent, slow):
            async with dripping(slow[1], head):
                for reader, _ in (silent, slow):
                    assert await until_closed(reader, 3) == b""
            await asyncio.sleep(0.1)
            assert f.http.connections == 0

    run(test())


def test_heads_have_a_size():
    async def test():
        async with serving(max_header_kb=16) as f, connected(f) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
            answer = b""
            with contextlib.suppress(ConnectionError):
                for _ in range(2048):
                    writer.write(b"x-a: " + b"b" * 1000 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
                    if reader._buffer:  # it has answered already
                        break
                answer = await reader.readline()
            assert b" 431" in answer

    run(test())


def test_connections_have_a_number():
    async def test():
        async with serving(max_connections=3, header_timeout_s=20) as f:
            async with connected(f, 3):
                await asyncio.sleep(0.1)
                async with connected(f) as (reader, _):
                    answer = await until_closed(reader, 5)
                assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer
            await asyncio.sleep(0.2)
            assert (await f.client.get("/health")).status_code == 200

    run(test())


def test_a_client_that_does_not_read_is_cut_and_holds_little():
    async def test():
        more = {"engine": {"num_pages": 3000, "max_num_seqs": 8}, "max_model_len": 1200}
        async with serving(lambda p: b"x" * 1150, write_timeout_s=0.5, **more) as f:
            ask = {**ASK, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 2}
            body = json.dumps({**ask, "return_token_ids": True, "max_tokens": 1150}).encode()
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", f.http.port))
            await loop.sock_sendall(
                sock,
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body,
            )
            most = 0
            async with asyncio.timeout(50):
                while not f.state.admission.requests:
                    await asyncio.sleep(0.01)
                while f.state.admission.requests:
                    await asyncio.sleep(0.01)
                    for writer in f.http._connections.values():
                        most = max(most, writer.transport.get_write_buffer_size())
            assert 0 < most <= 1 << 20
            await f.settle()
            got = b""
            with contextlib.suppress(ConnectionError):
                while piece := await loop.sock_recv(sock, 1 << 16):
                    got += piece
            assert got and b"[DONE]" not in got  # cut, not finished
            sock.close()

    run(test())


def test_the_end_of_an_answer_may_not_stay_unread():
    """Less than a write waits for: the connection is idle, and closing it has to end."""

    async def test():
        async with serving(write_timeout_s=0.5, header_timeout_s=0.3) as f:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", f.http.port))
            size = len((await f.client.get("/openapi.json")).content)
            await f.client.aclose()
            ask = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
            await loop.sock_sendall(sock, ask * (540_000 // size))
            unread = 0
            async with asyncio.timeout(5):
                while f.http.connections:
                    for writer in f.http._connections.values():
                        unread = max(unread, writer.transport.get_write_buffer_size())
                    await asyncio.sleep(0.01)
            assert 0 < unread <= 256 << 10
            sock.close()

    run(test())


def test_http2_and_websockets_are_not_served():
    async def test():
        async with serving() as f:
            async with connected(f) as (reader, writer):
                writer.write(
                    b"GET /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
                    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                )
                assert b"403" in await reader.readline()
            async with connected(f) as (reader, writer):
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                await asyncio.sleep(0.1)
            assert (await f.client.get("/health")).status_code == 200

    run(test())
