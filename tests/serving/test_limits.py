"""Counts and times of requests."""

import asyncio

from support.front import run, serving

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
KEYS = {"ann": "key-of-ann-1", "bob": "key-of-bob-2"}


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


def test_without_keys_all_are_nobodys_and_only_the_whole_is_bounded():
    async def test():
        async with serving(max_requests_per_key=1, max_requests=3) as f:
            f.gate.close()
            held = [asyncio.create_task(f.post(CHAT, ASK)) for _ in range(3)]
            while f.state.admission.requests < 3:
                await asyncio.sleep(0.01)
            r = await f.post(CHAT, ASK)
            assert r.status_code == 429 and r.json()["error"]["code"] == "queue_full"
            f.gate.open()
            assert [(await t).status_code for t in held] == [200] * 3

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
