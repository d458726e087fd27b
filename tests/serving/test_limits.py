"""Guards: keys, hosts, origins, sizes, times, counts. One test each."""

import asyncio
import contextlib
import hmac
import json
import socket
import sys
import threading
import tracemalloc

import pytest
from starlette.routing import Route
from support.front import run, serving

from jaxmoe.serving import middleware, text_api
from jaxmoe.serving.app import routes

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
KEYS = {"ann": "key-of-ann-1", "bob": "key-of-bob-2"}


@contextlib.asynccontextmanager
async def connected(f, count=1):
    """Raw connections."""
    made = [await asyncio.open_connection("127.0.0.1", f.http.port) for _ in range(count)]
    try:
        yield made[0] if count == 1 else made
    finally:
        for _, writer in made:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def until_closed(reader, timeout_s):
    """What still came until the other side closed."""
    data = b""
    async with asyncio.timeout(timeout_s):
        while piece := await reader.read(65536):
            data += piece
    return data


def test_every_route_wants_a_key_but_health_and_the_page():
    async def test():
        async with serving(keys=KEYS) as f:
            open_paths = {"/health", "/"}
            for route in routes(f.state):
                assert isinstance(route, Route)
                path = route.path.replace("{model:path}", "fake")
                for method in route.methods:
                    r = await f.client.request(method, path, content=b"{}")
                    assert (r.status_code == 401) == (path not in open_paths), (method, path)
            for path in ("/nope", "/v1", "//v1/models", "/health/", "/HEALTH", "/health%2f..%2fv1"):
                assert (await f.client.get(path)).status_code in (401, 404), path
                r = await f.client.get(path, headers={"x-api-key": KEYS["ann"]})
                assert r.status_code == 404, path

    run(test())


def test_a_host_header_does_not_move_the_path():
    """The class of CVE-2026-48710: the key check looks at the path that is routed by."""

    async def test():
        async with serving(keys=KEYS) as f:
            for host in ("x/health?", "127.0.0.1/health", "health", "x#/health"):
                r = await f.client.get("/v1/models", headers={"host": host})
                assert r.status_code in (400, 401, 403, 404), host
            async with connected(f) as (reader, writer):
                writer.write(b"GET http://x/health/../v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
                head = await reader.readline()
                assert b"401" in head or b"404" in head or b"400" in head

    run(test())


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"authorization": f"Bearer {KEYS['ann']}"}, 200),
        ({"authorization": f"bearer {KEYS['bob']}"}, 200),
        ({"x-api-key": KEYS["bob"]}, 200),
        ({"authorization": KEYS["ann"]}, 401),
        ({"authorization": f"Basic {KEYS['ann']}"}, 401),
        ({"authorization": f"Bearer {KEYS['ann']}x"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "ann"}, 401),
        ({}, 401),
    ],
)
def test_keys(headers, status):
    async def test():
        async with serving(keys=KEYS) as f:
            r = await f.client.get("/v1/models", headers=headers)
            assert r.status_code == status
            if status == 401:
                assert r.headers["www-authenticate"] == "Bearer"
                assert r.json()["error"]["type"] == "authentication_error"
                assert not any(k in r.text for k in KEYS.values())
                r = await f.post("/v1/messages", {}, headers=headers)
                assert r.status_code == 401 and r.json()["type"] == "error"

    run(test())


def test_keys_are_compared_as_hashes_in_constant_time(monkeypatch):
    seen = []

    def compare(a, b):
        seen.append((len(a), len(b)))
        return compare_digest(a, b)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", compare)

    async def test():
        async with serving(keys=KEYS) as f:
            await f.client.get("/v1/models", headers={"x-api-key": KEYS["ann"]})
            await f.client.get("/v1/models", headers={"x-api-key": "short"})

    run(test())
    assert seen == [(32, 32)] * 4  # all keys each time, whichever matches


def test_hosts_against_dns_rebinding():
    async def test():
        async with serving() as f:
            for host, status in [
                (f"127.0.0.1:{f.http.port}", 200),
                ("localhost", 200),
                ("LOCALHOST:1", 200),
                ("[::1]:8000", 200),
                ("evil.example", 403),
                ("127.0.0.1.evil.example", 403),
            ]:
                r = await f.client.get("/v1/models", headers={"host": host})
                assert r.status_code == status, host
        async with serving(allowed_hosts="box.lan") as f:
            assert (await f.client.get("/health", headers={"host": "box.lan:80"})).is_success
            assert (await f.client.get("/health")).status_code == 403
        async with serving(keys=KEYS) as f:  # a key is guard enough
            assert (await f.client.get("/health", headers={"host": "box.lan"})).is_success

    run(test())


def test_pages_of_other_origins_stay_out_unless_named():
    origin = {"origin": "https://app.example"}
    preflight = {**origin, "access-control-request-method": "POST"}

    async def test():
        async with serving() as f:
            r = await f.client.options(CHAT, headers=preflight)
            assert r.status_code == 405 and "access-control-allow-origin" not in r.headers
            # What needs no preflight is not taken as JSON.
            r = await f.client.post(
                CHAT, content=json.dumps(ASK), headers={**origin, "content-type": "text/plain"}
            )
            assert r.status_code == 415
        async with serving(allowed_origins="https://app.example", keys=KEYS) as f:
            r = await f.client.options(CHAT, headers=preflight)
            assert r.status_code == 204
            assert r.headers["access-control-allow-origin"] == "https://app.example"
            r = await f.client.get("/health", headers={"origin": "https://other.example"})
            assert "access-control-allow-origin" not in r.headers

    run(test())


def test_pages_can_read_errors_and_send_their_clients_headers(monkeypatch):
    origin = {"origin": "https://app.example"}
    key = {**origin, "x-api-key": KEYS["ann"]}
    names = "authorization, content-type, x-stainless-os, anthropic-beta"
    preflight = {**origin, "access-control-request-method": "POST"}

    async def test():
        more = {"allowed_origins": "https://app.example", "max_body_mb": 1, "keys": KEYS}
        async with serving(**more) as f:
            ask = {"access-control-request-headers": names}
            r = await f.client.options(CHAT, headers={**preflight, **ask})
            assert r.headers["access-control-allow-headers"] == names
            for wrong in ("a" * 3000, "a\tb", "*"):
                ask = {"access-control-request-headers": wrong}
                r = await f.client.options(CHAT, headers={**preflight, **ask})
                assert r.status_code == 204 and "access-control-allow-headers" not in r.headers
            answers = [
                (401, await f.post(CHAT, ASK, headers=origin)),
                (400, await f.post(CHAT, {}, headers=key)),
                (404, await f.client.get("/nope", headers=key)),
                (413, await f.post(CHAT, {"x": "a" * (1 << 20)}, headers=key)),
            ]
            monkeypatch.setattr(f.state, "encode", None)
            answers.append((500, await f.post(CHAT, ASK, headers=key)))
            for status, r in answers:
                assert r.status_code == status
                assert r.headers["access-control-allow-origin"] == "https://app.example"
                assert "x-request-id" in r.headers
            other = {"origin": "https://other.example"}
            r = await f.post(CHAT, ASK, headers=other)
            assert r.status_code == 401 and "access-control-allow-origin" not in r.headers

    run(test())


def test_bodies_have_a_size():
    async def test():
        async with serving(max_body_mb=1) as f:
            big = b'{"x": "' + b"a" * (1 << 20) + b'"}'
            headers = {"content-type": "application/json"}
            r = await f.client.post(CHAT, content=big, headers=headers)
            assert r.status_code == 413 and r.json()["error"]["code"] == "body_too_large"

            async def pieces():
                for at in range(0, len(big), 65536):
                    yield big[at : at + 65536]

            r = await f.client.post(CHAT, content=pieces(), headers=headers)
            assert r.status_code == 413
            assert (await f.post(CHAT, ASK)).status_code == 200

    run(test())


def test_bodies_in_memory_have_a_bound_together():
    async def test():
        async with serving(max_body_mb=2, max_buffered_mb=3) as f:
            big = dict(ASK)
            head = (
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"content-length: {2 << 20}\r\n\r\n"
            ).encode()
            async with connected(f, 2) as held:
                for _, writer in held:
                    writer.write(head + b"a" * ((3 << 19) - 4096))
                    await writer.drain()
                await asyncio.sleep(0.2)
                big["x"] = "a" * (1 << 20)
                r = await f.post(CHAT, big)
                assert r.status_code == 429 and "retry-after" in r.headers
            await asyncio.sleep(0.2)
            assert (await f.post(CHAT, big)).status_code == 200

    run(test())


def test_large_bodies_are_checked_beside_the_loop(monkeypatch):
    async def test():
        async with serving() as f:
            seen, kept = [], []
            check = f.state.checker.check

            def noted(endpoint, body):
                seen.append(_on_main())
                return check(endpoint, body)

            monkeypatch.setattr(f.state.checker, "check", noted)
            monkeypatch.setattr(text_api, "check_ids", lambda *_: kept.append(_on_main()))
            for count in (10, 40_000):
                r = await f.post("/detokenize", {"tokens": [97] * count})
                assert r.json()["text"] == "a" * count
            wrong = {"tokens": [97] * 40_000, "add_special_tokens": 5, "model": 5}
            r = await f.post("/detokenize", wrong)
            assert r.status_code == 400 and r.json()["error"]["param"] == "model"
            assert seen == [True, False, False] and kept == [False, False]

    run(test())


def test_a_body_of_small_pieces_takes_its_size_and_is_handed_on():
    """A list of its pieces would be fifteen times that."""
    count = 200_000

    async def receive():
        nonlocal count
        count -= 1
        return {"type": "http.request", "body": b"%03d" % (count % 1000), "more_body": count > 0}

    async def app(scope, receive, send):
        body = (await receive())["body"]
        assert len(body) == 600_000
        seen.append((tracemalloc.get_traced_memory()[1], sys.getrefcount(body)))

    seen = []
    bodies = middleware.Bodies(app, max_bytes=1 << 20, max_buffered_bytes=1 << 20, timeout_s=60)
    tracemalloc.start()
    try:
        run(bodies({"headers": []}, receive, None))
    finally:
        tracemalloc.stop()
    ((peak, references),) = seen
    assert peak < 3 * 600_000 and references == 2  # the handler's, and getrefcount's


def _on_main():
    return threading.current_thread() is threading.main_thread()


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


def test_requests_of_a_key_have_a_number():
    async def test():
        async with serving(keys=KEYS, max_requests_per_key=2) as f:
            f.gate.close()
            ann, bob = ({"x-api-key": k} for k in KEYS.values())
            held = [asyncio.create_task(f.post(CHAT, ASK, headers=ann)) for _ in range(2)]
            while f.state.admission.requests < 2:
                await asyncio.sleep(0.01)
            r = await f.post(CHAT, ASK, headers=ann)
            assert r.status_code == 429 and r.headers["retry-after"] == "1"
            assert r.json()["error"]["type"] == "rate_limit_error"
            other = asyncio.create_task(f.post(CHAT, ASK, headers=bob))
            await asyncio.sleep(0.1)
            f.gate.open()
            assert [(await t).status_code for t in (*held, other)] == [200] * 3
            assert f.state.admission.requests == 0

    run(test())


def test_requests_have_a_number_before_they_are_tokenized(monkeypatch):
    async def test():
        async with serving(max_requests=2) as f:
            f.gate.close()
            held = [asyncio.create_task(f.post(CHAT, ASK)) for _ in range(2)]
            while f.state.admission.requests < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            monkeypatch.setattr(f.state, "encode", None)  # would be a 500
            for path in (CHAT, "/v1/completions", "/v1/messages", "/tokenize"):
                r = await f.post(path, ASK)
                assert r.status_code == 429 and "retry-after" in r.headers
            monkeypatch.undo()
            f.gate.open()
            assert [(await t).status_code for t in held] == [200] * 2

    run(test())


def test_a_full_queue_is_429_at_once():
    async def test():
        from jaxmoe.engine.admission import QueueBounds

        async with serving() as f:
            f.fake._mailboxes._bounds = QueueBounds(max_requests=2)
            f.gate.close()
            held = [asyncio.create_task(f.post(CHAT, ASK)) for _ in range(2)]
            while f.state.admission.requests < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            for stream in (False, True):
                r = await f.post(CHAT, {**ASK, "stream": stream})
                assert r.status_code == 429 and "retry-after" in r.headers, r.text
                assert "max_queued_requests" in r.json()["error"]["message"]
            f.gate.open()
            assert [(await t).status_code for t in held] == [200] * 2

    run(test())


def test_a_request_has_a_time():
    async def test():
        async with serving() as f:
            f.gate.close()
            short = {"x-request-timeout": "0.3"}
            r = await f.post(CHAT, ASK, headers=short)
            assert r.status_code == 408 and r.json()["error"]["code"] == "request_timeout"
            async with f.client.stream(
                "POST", CHAT, json={**ASK, "stream": True}, headers={"x-request-timeout": "0.6"}
            ) as r:
                text = (await r.aread()).decode()
            assert r.status_code == 200 and "request_timeout" in text and "[DONE]" in text
            for wrong in ("x", "-1", "0", "nan", "inf"):
                r = await f.post(CHAT, ASK, headers={"x-request-timeout": wrong})
                assert r.status_code == 400, wrong
            f.gate.open()
            await f.settle()

    run(test())


def test_request_ids_go_in_and_out():
    async def test():
        async with serving() as f:
            r = await f.client.get("/health", headers={"x-request-id": "mine-1"})
            assert r.headers["x-request-id"] == "mine-1"
            for bad in ("a b", "x" * 129, "a\x7f", "<script>"):
                r = await f.client.get("/health", headers={"x-request-id": bad})
                assert r.headers["x-request-id"].startswith("req_")

    run(test())


@pytest.mark.parametrize(
    "content, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"temperature": NaN, "messages": []}', 400),
        (b'{"temperature": 1e999, "messages": []}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b"\xff\xfe", 400),
    ],
)
def test_json_that_is_none(content, status):
    async def test():
        async with serving() as f:
            headers = {"content-type": "application/json"}
            for path in (CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"):
                r = await f.client.post(path, content=content, headers=headers)
                assert r.status_code == status, (path, r.text)
                assert r.json()["error"]["message"]

    run(test())


def test_an_error_inside_the_server_is_500_with_an_id_and_nothing_else(caplog, monkeypatch):
    async def test():
        async with serving() as f:

            def broken(*_):
                raise ZeroDivisionError("secret")

            monkeypatch.setattr(f.state, "info", broken)
            r = await f.post(CHAT, ASK, headers={"x-request-id": "find-me"})
            assert r.status_code == 500 and "find-me" in r.text and "secret" not in r.text

    run(test())
    assert any("find-me" in m for m in caplog.messages)


def test_logs_are_json_without_prompts(capsys):
    import io
    import logging

    from jaxmoe.common.logs import JsonFormatter, TextFormatter

    streams = [io.StringIO(), io.StringIO()]
    handlers = [logging.StreamHandler(s) for s in streams]
    handlers[0].setFormatter(JsonFormatter())
    handlers[1].setFormatter(TextFormatter())
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for h in handlers:
        root.addHandler(h)

    async def test():
        async with serving(lambda prompt: b"the answer") as f:
            ask = {"messages": [{"role": "user", "content": "my secret"}], "evil\n\x1b[0m": 1}
            await f.post(CHAT, ask)
            await f.client.get("/a%0a%1b[31mforged")

    try:
        run(test())
    finally:
        root.setLevel(level)
        for h in handlers:
            root.removeHandler(h)
    text = streams[0].getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    assert any(r.get("request_id") and r.get("status") == 200 for r in lines)
    for shown in (text, streams[1].getvalue()):
        assert "my secret" not in shown and "the answer" not in shown and "\x1b" not in shown
    assert not any(line.startswith("forged") for line in streams[1].getvalue().splitlines())


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
