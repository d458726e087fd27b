"""An OpenAI-compatible server of a few lines whose answers are a script: for tests of clients.

Each POST is noted in `server.requests` and answered by `server.script(path, body)`, which returns
a `Refusal` or yields the events of a stream, numbers between them being seconds of silence.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

MODEL = "scripted-model"


class Refusal(NamedTuple):
    status: int
    message: str
    headers: dict[str, str] = {}


Script = Callable[[str, dict[str, Any]], "Refusal | Iterable[Any]"]


def chunk(text: str | None = None, **delta: Any) -> dict[str, Any]:
    """A chat chunk with `text` as content, or with the delta's other fields."""
    if text is not None:
        delta["content"] = text
    return _event("chat.completion.chunk", {"index": 0, "delta": delta, "finish_reason": None})


def finish(reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "delta": {}, "finish_reason": reason}
    return _event("chat.completion.chunk", choice)


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    """A chunk of /v1/completions."""
    return _event("text_completion", {"index": 0, "text": text, "finish_reason": reason})


def usage(prompt: int, completion: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    total = {"total_tokens": prompt + completion}
    return {**_event("chat.completion.chunk"), "usage": counts | total}


def _event(kind: str, *choices: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "object": kind, "created": 1, "model": MODEL, "choices": list(choices)}


class FakeOpenAi(ThreadingHTTPServer):
    """script: see the module. ready: what /ready answers, status and body. key: wanted as the
    bearer token, if any. page: body and headers of `/`.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.ready: tuple[int, dict[str, Any]] = (200, {"status": "ready"})
        self.key: str | None = None
        self.page: tuple[bytes, dict[str, str]] = (b"", {})
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.gone = 0  # clients that left in the middle of a stream
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeOpenAi

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            body, headers = self.server.page
            self._send(200, body, headers)
        elif not self._authorized():
            self._json(401, {"error": {"message": "Incorrect API key provided"}})
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif self.path == "/ready":
            self._json(*self.server.ready)
        else:
            self._json(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._authorized():
            self._json(401, {"error": {"message": "Incorrect API key provided"}})
            return
        with self.server.lock:
            self.server.requests.append((self.path, body))
        answer = self.server.script(self.path, body)
        if isinstance(answer, Refusal):
            self._json(answer.status, {"error": {"message": answer.message}}, answer.headers)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for event in answer:
                if isinstance(event, (int, float)):
                    time.sleep(event)
                    self._write(b": ping\n\n")  # which also notices that the client left
                elif isinstance(event, bytes):
                    self._write(event)
                else:
                    self._write(b"data: " + json.dumps(event).encode() + b"\n\n")
        except OSError:
            with self.server.lock:
                self.server.gone += 1

    def _authorized(self) -> bool:
        key = self.server.key
        return key is None or self.headers.get("authorization") == f"Bearer {key}"

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self._send(status, data, {"content-type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


DONE = b"data: [DONE]\n\n"


@contextlib.contextmanager
def serving(script: Script) -> Iterator[FakeOpenAi]:
    with FakeOpenAi(script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
