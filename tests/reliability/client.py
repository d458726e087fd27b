"""A small HTTP/1.1 client on plain sockets: fast, and able to misbehave at any byte."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import time
import urllib.request
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# Some text of the model; the chunk that opens a stream has none.
_TEXT = re.compile(rb'"(?:content|text)":"[^"]')


def encode(path: str, body: Any = None, *, close: bool = True, **headers: str) -> bytes:
    """A whole request; a GET without a body."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: 127.0.0.1"]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    lines += ["connection: close"] if close else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


@dataclasses.dataclass
class Answer:
    """What came back. first_s: from the request to the first text of the model; whole_s: to the
    end. body: without chunk framing.
    """

    status: int = 0
    body: bytes = b""
    first_s: float = 0.0
    whole_s: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream; "[DONE]" as text."""
        out = []
        for block in self.body.decode().split("\n\n"):
            data = "".join(s[6:] for s in block.split("\n") if s.startswith("data: "))
            if data:
                out.append(data if data == "[DONE]" else json.loads(data))
        return out

    @property
    def has_end(self) -> bool:
        """Whether a stream told its end: a finish_reason or an error, and [DONE]."""
        try:
            events = self.events
        except ValueError:
            return False
        told = any(
            "error" in e or any(c.get("finish_reason") for c in e.get("choices", ()))
            for e in events
            if isinstance(e, dict)
        )
        return told and events[-1] == "[DONE]"


async def exchange(port: int, data: bytes, timeout_s: float = 60.0) -> Answer:
    """Sends a request with `connection: close` and reads to the end. Raises TimeoutError, and
    OSError where the server closes without an answer.
    """
    start = time.monotonic()
    answer, raw = Answer(), bytearray()
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            writer.write(data)
            while piece := await reader.read(1 << 16):
                raw += piece
                if not answer.first_s and _TEXT.search(raw):
                    answer.first_s = time.monotonic() - start
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    answer.whole_s = time.monotonic() - start
    head, _, body = bytes(raw).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        raise ConnectionError(f"no answer but {bytes(raw[:60])!r}")
    answer.status = int(head[9:12])
    chunked = b"transfer-encoding: chunked" in head.lower()
    answer.body = _dechunked(body) if chunked else body
    answer.first_s = answer.first_s or answer.whole_s
    return answer


class Pool:
    """Kept connections, as clients have them; streams take theirs along to the end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, path: str, body: Any, timeout_s: float = 60.0) -> Answer:
        """Raises TimeoutError, and OSError where the server closes without an answer."""
        data = encode(path, body, close=False)
        start = time.monotonic()
        async with asyncio.timeout(timeout_s):
            while self._idle:
                reader, writer = self._idle.pop()
                if not reader.at_eof() and not writer.is_closing():
                    break
                writer.close()
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(data)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            answer = Answer(int(head[9:12]))
            if b"content-length: " in head:
                size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                answer.body = await reader.readexactly(size)
                self._idle.append((reader, writer))
            else:
                raw = bytearray()
                while not raw.endswith(b"\r\n0\r\n\r\n"):
                    piece = await reader.read(1 << 16)
                    if not piece:
                        break
                    raw += piece
                    if not answer.first_s and _TEXT.search(raw):
                        answer.first_s = time.monotonic() - start
                answer.body = _dechunked(bytes(raw))
                writer.close()
        answer.whole_s = time.monotonic() - start
        answer.first_s = answer.first_s or answer.whole_s
        return answer

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def _dechunked(body: bytes) -> bytes:
    out, at = [], 0
    while at < len(body):
        end = body.find(b"\r\n", at)
        if end < 0:
            break
        size = int(body[at:end], 16)
        out.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(out)


async def ask(port: int, path: str, body: Any = None, **headers: str) -> Answer:
    return await exchange(port, encode(path, body, **headers))


def get(url: str, path: str, timeout_s: float = 10.0) -> tuple[int, bytes]:
    """A blocking GET: status and body."""
    request = urllib.request.Request(url + path)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as r:
            return r.status, r.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def parse_metrics(text: str) -> dict[str, float]:
    """Samples by name with labels, without the prefix."""
    out = {}
    for line in text.splitlines():
        if line.startswith("jaxmoe_"):
            name, _, value = line.rpartition(" ")
            out[name.removeprefix("jaxmoe_")] = float(value)
    return out


def metrics(url: str) -> dict[str, float]:
    return parse_metrics(get(url, "/metrics")[1].decode())


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | more
