"""Who is let in: keys, hosts, origins."""

import hmac
import json

import pytest
from starlette.routing import Route
from support.front import run, serving
from support.raw_sockets import connected

from jaxmoe.serving import middleware
from jaxmoe.serving.app import routes

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
KEYS = {"ann": "key-of-ann-1", "bob": "key-of-bob-2"}


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
