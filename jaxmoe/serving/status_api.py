"""What one asks a server about itself: models, health, readiness, metrics, version, props."""

from __future__ import annotations

import platform
import sys
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

from jaxmoe.serving import metrics
from jaxmoe.serving.asgi import Receive, Scope, Send, header, send_bytes, send_json
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.openapi import openapi
from jaxmoe.serving.state import ServerState
from jaxmoe.serving.web.page import chat_page

Answer = Callable[[ServerState, Scope, Send], Awaitable[None]]


class GetEndpoint:
    """A route that takes no body. An ASGI application."""

    def __init__(self, state: ServerState, answer: Answer) -> None:
        self._state = state
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(self._state, scope, send)


def _model(state: ServerState, name: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "jaxmoe",
    }
    status = state.engine.status()
    if status.state == "ready":
        out["max_model_len"] = state.engine.info.max_model_len
    return out


async def models(state: ServerState, scope: Scope, send: Send) -> None:
    data = [_model(state, name) for name in state.model_names]
    # Anthropic's clients page through the same route.
    more = {"has_more": False, "first_id": state.model, "last_id": state.model_names[-1]}
    if header(scope, b"anthropic-version") is not None:
        for m in data:
            m |= {"type": "model", "display_name": m["id"], "created_at": "1970-01-01T00:00:00Z"}
    await send_json(send, 200, {"object": "list", "data": data, **more})


async def model(state: ServerState, scope: Scope, send: Send) -> None:
    name = scope["path_params"]["model"]
    state.check_model(name)
    await send_json(send, 200, _model(state, name))


async def health(state: ServerState, scope: Scope, send: Send) -> None:
    """Alive: 503 once the engine is dead or restarting. Says nothing more, for it has no key."""
    status = state.engine.status()
    down = status.state in ("dead", "restarting")
    await send_json(send, 503 if down else 200, {"status": "down" if down else "ok"})


async def ready(state: ServerState, scope: Scope, send: Send) -> None:
    """200 while requests are taken, with how many programs are compiled ahead; else 503 with what
    is being waited for.
    """
    status = state.engine.status()
    name = "draining" if state.draining else status.state
    out: dict[str, Any] = {"status": name, "model": state.model}
    if name == "ready":
        stats = state.engine.stats()
        planned = int(stats.get("warm_up_programs_planned", 0))
        if planned:
            compiled = int(stats.get("warm_up_programs_compiled", 0))
            out["programs"] = {"compiled": compiled, "planned": planned}
        await send_json(send, 200, out)
        return
    out |= {"stage": status.stage, "percent": round(status.percent, 1), "error": status.error}
    await send_json(send, 503, out, [(b"retry-after", b"5")])


async def metrics_text(state: ServerState, scope: Scope, send: Send) -> None:
    state.metrics.in_work.set(state.admission.requests)
    await send_bytes(send, 200, state.metrics.text(), metrics.CONTENT_TYPE)


async def props(state: ServerState, scope: Scope, send: Send) -> None:
    await send_json(send, 200, state.props())


async def version(state: ServerState, scope: Scope, send: Send) -> None:
    packages = ("jax", "jaxlib", "tokenizers", "starlette", "hypercorn", "llguidance")
    out: dict[str, Any] = {
        "version": metadata.version("jaxmoe"),
        "python": platform.python_version(),
    }
    for name in packages:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    out["platform"] = f"{sys.platform} {platform.machine()}"
    await send_json(send, 200, out)


async def openapi_json(state: ServerState, scope: Scope, send: Send) -> None:
    await send_json(send, 200, openapi(has_keys=state.has_keys))


async def page(state: ServerState, scope: Scope, send: Send) -> None:
    if not state.config.chat_page:
        raise ApiError(404, "the chat page is off (--nochat_page)")
    found = chat_page()
    headers = [(k.encode(), v.encode()) for k, v in found.headers.items() if k != "content-type"]
    if found.is_current(header(scope, b"if-none-match")):
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    kind = found.headers["content-type"].encode()
    await send_bytes(send, 200, found.body, kind, headers)
