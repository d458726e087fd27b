"""The application: routes, and what every request passes before them.

Starlette routes; bodies are checked by our own table (fields.py), which also makes the OpenAPI
description, so no second description of the same fields is kept in a validation library.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from jaxmoe.serving import chat, completions, messages_api, responses_api, status_api, text_api
from jaxmoe.serving.asgi import App, Receive, Scope, Send
from jaxmoe.serving.endpoints import Handler, PostEndpoint
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import ENDPOINTS, Endpoint
from jaxmoe.serving.middleware import PUBLIC_PATHS, Bodies, Cors, Hosts, Keys, Requests
from jaxmoe.serving.server_config import split_names
from jaxmoe.serving.state import ServerState
from jaxmoe.serving.status_api import Answer, GetEndpoint

HANDLERS: dict[Endpoint, Handler] = {
    "chat": chat.handle,
    "completions": completions.handle,
    "responses": responses_api.handle,
    "messages": messages_api.handle,
    "count_tokens": messages_api.count_tokens,
    "tokenize": text_api.tokenize,
    "detokenize": text_api.detokenize,
}
GETS: dict[str, Answer] = {
    "/": status_api.page,
    "/health": status_api.health,
    "/ready": status_api.ready,
    "/metrics": status_api.metrics_text,
    "/props": status_api.props,
    "/version": status_api.version,
    "/openapi.json": status_api.openapi_json,
    "/v1/models": status_api.models,
    "/v1/models/{model:path}": status_api.model,
}


def routes(state: ServerState) -> list[Route]:
    posts = [
        Route(ENDPOINTS[name], PostEndpoint(state, name, handler), methods=["POST"])
        for name, handler in HANDLERS.items()
    ]
    gets = [Route(path, GetEndpoint(state, a), methods=["GET"]) for path, a in GETS.items()]
    return [*posts, *gets]


def make_app(state: ServerState, keys: Mapping[str, str]) -> App:
    """The whole application. keys: API keys by name; without any, nobody is asked for one."""
    config = state.config
    state.has_keys = bool(keys)
    router = Router(routes(state), redirect_slashes=False, default=_not_found)
    paths = {route.path for route in router.routes if isinstance(route, Route)}

    def observe(method: str, path: str, status: int, seconds: float) -> None:
        shown = path if path in paths else "/v1/models/" if path.startswith("/v1/models/") else "?"
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "?"
        state.metrics.observe_http(method, shown, status, seconds)

    app: App = _Errors(router)
    app = Bodies(
        app,
        max_bytes=config.max_body_mb << 20,
        max_buffered_bytes=config.max_buffered_mb << 20,
        timeout_s=config.body_timeout_s,
    )
    # The page itself holds no secret; it asks its user for the key.
    public = PUBLIC_PATHS | ({"/"} if config.chat_page else frozenset())
    app = Keys(app, keys, public)
    app = Hosts(app, config.hosts(bool(keys)))
    return Cors(Requests(app, observe), split_names(config.allowed_origins))


class _Errors:
    """Starlette's own refusals in our shape."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # makes Starlette raise instead of answering by itself
        try:
            await self._router(scope, receive, send)
        except HTTPException as e:
            if e.status_code == 405:
                allowed = (e.headers or {}).get("Allow", "")
                message = f"{scope['method']} is not for {scope['path'][:200]}; wanted {allowed}"
                raise ApiError(405, message, code="method_not_allowed") from None
            raise ApiError(e.status_code, str(e.detail)) from None


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(
        404, f"{scope['path'][:200]}: no such path; /openapi.json lists them", code="not_found"
    )
