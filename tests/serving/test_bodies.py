"""Bodies: their size, their memory, and JSON that is none."""

import asyncio
import sys
import threading
import tracemalloc

import pytest
from support.front import run, serving
from support.raw_sockets import connected

from jaxmoe.serving import middleware, text_api

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


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
