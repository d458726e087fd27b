"""Request ids, errors inside the server, and what the log holds."""

import json

from support.front import run, serving

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def test_request_ids_go_in_and_out():
    async def test():
        async with serving() as f:
            r = await f.client.get("/health", headers={"x-request-id": "mine-1"})
            assert r.headers["x-request-id"] == "mine-1"
            for bad in ("a b", "x" * 129, "a\x7f", "<script>"):
                r = await f.client.get("/health", headers={"x-request-id": bad})
                assert r.headers["x-request-id"].startswith("req_")

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
