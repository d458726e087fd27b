"""One request of a load test: sent to an OpenAI-compatible endpoint, its stream timed.

Times are `time.perf_counter` seconds. What it does not do: decide when requests are sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxmoe.common.errors import ConfigError

if TYPE_CHECKING:
    import httpx

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclasses.dataclass
class Timed:
    """What became of a request.

    due_s: when it was to be sent; waiting for a connection or a turn counts as the server's time.
    chunk_s: when each piece of text came; a piece is a token on most servers. output_tokens: what
    the server counted, or else the pieces. error: empty if it was answered to its end.
    """

    due_s: float
    end_s: float = 0.0
    chunk_s: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    finish_reason: str | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None where there is only one."""
        if self.output_tokens < 2 or len(self.chunk_s) < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Times between successive pieces."""
        return [b - a for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


def http_client(url: str, key: str | None, timeout_s: float) -> httpx.AsyncClient:
    """A client for one endpoint; raises ConfigError where httpx is missing or the URL is none."""
    try:
        import httpx
    except ImportError:
        raise ConfigError(
            "jaxmoe_bench needs httpx, which is not installed: pip install 'jaxmoe[bench]'"
        ) from None
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise ConfigError(f"--url: got {url!r}: {e}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--url: got {url!r}, wanted one like http://127.0.0.1:8000")
    # With or without /v1 at the end: both are written.
    path = parsed.path.rstrip("/").removesuffix("/v1")
    return httpx.AsyncClient(
        base_url=parsed.copy_with(path=path + "/"),
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(timeout_s, connect=30.0),
        # One connection a request in flight; a limit here would measure itself.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        # Proxies of the environment are not for this machine.
        trust_env=parsed.host not in ("127.0.0.1", "localhost", "::1"),
    )


async def first_model(client: httpx.AsyncClient) -> str:
    """The first model the endpoint names; ConfigError if it names none or does not answer."""
    import httpx

    try:
        response = await client.get("v1/models")
    except httpx.HTTPError as e:
        raise ConfigError(f"--url: {client.base_url} does not answer: {_words(e)}") from None
    if response.status_code != 200:
        raise ConfigError(f"{client.base_url}v1/models: {problem(response)}")
    try:
        return response.json()["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ConfigError(
            f"{client.base_url}v1/models names no model; give one with --model"
        ) from None


async def send(
    client: httpx.AsyncClient,
    endpoint: str,
    body: Mapping[str, Any],
    due_s: float,
    timed: Timed | None = None,
) -> Timed:
    """Sends one request and times its answer; whatever goes wrong is in `error`.

    timed: filled meanwhile, for who wants to look while the answer comes; returned.
    """
    import httpx
    import orjson

    timed = timed or Timed(due_s)
    content = orjson.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    headers = {"content-type": "application/json", "accept": "text/event-stream"}
    path = PATHS[endpoint].lstrip("/")
    try:
        async with client.stream("POST", path, content=content, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                timed.error = problem(response)
            else:
                async for event in _events(response):
                    _take(timed, event)
                if not timed.error and timed.finish_reason is None:
                    timed.error = "the stream ended without a finish_reason"
    except (httpx.HTTPError, ValueError) as e:
        timed.error = _words(e)
    except asyncio.CancelledError:
        timed.error = "cancelled"
        raise
    timed.end_s = time.perf_counter()
    if not timed.error and not timed.chunk_s:
        timed.error = "the answer has no text"
    if not timed.counted:
        timed.output_tokens = len(timed.chunk_s)
    return timed


def _take(timed: Timed, event: Any) -> None:
    if not isinstance(event, dict):
        raise ValueError(f"an event is {str(event)[:80]!r}, wanted an object")
    if error := event.get("error"):
        timed.error = str(error.get("message", error) if isinstance(error, dict) else error)
    if usage := event.get("usage"):
        timed.prompt_tokens = usage.get("prompt_tokens")
        timed.output_tokens = usage.get("completion_tokens", 0)
        timed.counted = True
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        text = delta.get("content") or delta.get("text")
        if text or delta.get("reasoning_content") or delta.get("reasoning"):
            timed.chunk_s.append(time.perf_counter())
        timed.finish_reason = choice.get("finish_reason") or timed.finish_reason


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    """The JSON of every event. Cut at line feeds only: text may hold other line separators."""
    import orjson

    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                value = line[5:].strip()
                if value == b"[DONE]":
                    return
                yield orjson.loads(value)


def problem(response: httpx.Response) -> str:
    """A refusal in words: its status, and the message of its body."""
    words = response.text[:200]
    try:
        error = response.json()["error"]
        words = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return f"status {response.status_code}: {' '.join(words.split())}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
