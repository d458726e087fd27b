"""/openapi.json, made from the table of fields."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from jaxmoe.serving.fields import ENDPOINTS, Endpoint, fields_of

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
_USAGE = {
    "type": "object",
    "properties": {
        name: {"type": "integer", "minimum": 0}
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}
_FINISH = {"enum": ["stop", "length", "tool_calls", "abort"]}


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    choice = {
        **choice,
        "index": {"type": "integer", "minimum": 0},
        "logprobs": {"type": ["object", "null"]},
        "finish_reason": _FINISH,
    }
    properties = {
        "id": {"type": "string"},
        "object": {"const": kind},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {"type": "object", "properties": choice, "required": list(choice)},
        },
        "usage": _USAGE,
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": ["string", "null"]},
        "refusal": {"type": "null"},
        "reasoning_content": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["role", "content", "refusal"],
}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_ANSWERS: dict[Endpoint, dict[str, Any]] = {
    "chat": _answer("chat.completion", {"message": _MESSAGE}),
    "completions": _answer("text_completion", {"text": {"type": "string"}}),
    "responses": _object(
        id={"type": "string"},
        object={"const": "response"},
        status={"enum": ["completed", "incomplete", "failed"]},
        output={"type": "array"},
        usage={"type": "object"},
    ),
    "messages": _object(
        id={"type": "string"},
        type={"const": "message"},
        role={"const": "assistant"},
        content={"type": "array"},
        stop_reason={"type": "string"},
        usage={"type": "object"},
    ),
    "count_tokens": _object(input_tokens={"type": "integer", "minimum": 0}),
    "tokenize": _object(
        count={"type": "integer", "minimum": 0},
        max_model_len={"type": "integer"},
        tokens={"type": "array", "items": {"type": "integer"}},
    ),
    "detokenize": _object(prompt={"type": "string"}),
}
_STREAMS: tuple[Endpoint, ...] = ("chat", "completions", "responses", "messages")
_SUMMARIES: dict[Endpoint, str] = {
    "chat": "Answer a conversation",
    "completions": "Continue a prompt",
    "responses": "Answer items (stateless)",
    "messages": "Answer a conversation, in Anthropic's form",
    "count_tokens": "Count the tokens of a conversation",
    "tokenize": "Tokens of a text or a conversation",
    "detokenize": "Text of tokens",
}
_GETS = {
    "/health": ("Alive", (200, 503)),
    "/ready": ("Taking requests, or what is being waited for", (200, 503)),
    "/metrics": ("Figures in Prometheus' format", (200,)),
    "/props": ("What the server is", (200,)),
    "/version": ("Versions", (200,)),
    "/openapi.json": ("This description", (200,)),
    "/v1/models": ("The models", (200,)),
    "/v1/models/{model}": ("One model", (200, 404)),
}
_STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)


def body_schema(endpoint: Endpoint) -> dict[str, Any]:
    """The JSON schema of an endpoint's body."""
    properties, required = {}, []
    for field in fields_of(endpoint):
        schema = field.json_schema
        properties[field.name] = schema
        for alias in field.aliases:
            properties[alias] = {**schema, "description": f"the same as {field.name}"}
        if field.required:
            required.append(field.name)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": True,
    }


def openapi(*, has_keys: bool) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for endpoint, path in ENDPOINTS.items():
        is_anthropic = path.startswith("/v1/messages")
        error = _ANTHROPIC_ERROR if is_anthropic else _ERROR
        content: dict[str, Any] = {"application/json": {"schema": _ANSWERS[endpoint]}}
        if endpoint in _STREAMS:
            content["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "operationId": endpoint,
                "summary": _SUMMARIES[endpoint],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body_schema(endpoint)}},
                },
                "responses": {
                    "200": {"description": "the answer", "content": content},
                    **{str(s): _response("an error", error) for s in _STATUSES},
                },
            }
        }
    for path, (summary, statuses) in _GETS.items():
        get: dict[str, Any] = {
            "operationId": path.strip("/").replace("/", "_").replace("{model}", "one"),
            "summary": summary,
            "responses": {
                **{str(s): {"description": summary} for s in statuses},
                **{str(s): _response("an error", _ERROR) for s in (401, 403, 405)},
            },
        }
        if "{model}" in path:
            get["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths[path] = {"get": get}
    out: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jaxmoe", "version": metadata.version("jaxmoe")},
        "paths": paths,
    }
    if has_keys:
        out["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        out["security"] = [{"key": []}]
    return out


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
