"""The lines of an offline batch: whose a line is and which form it has, and the record that answers
it.

Two forms: OpenAI's batch format ({"custom_id", "method", "url", "body"}), whose bodies are the
server's to check (batch_answers.py), and plain lines (batch_plain.py). A line that is wrong gets a
record with an `error`; other lines are not affected. What it does not do: look into a body, files,
engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import orjson

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import ENDPOINTS, OPENAI, Endpoint

MAX_LINE_BYTES = 32 << 20
URLS: dict[str, Endpoint] = {ENDPOINTS[name]: name for name in OPENAI}
_ENVELOPE = ("custom_id", "method", "url", "body")


class LineError(RequestError):
    """A line that cannot be answered. code: a word for programs; custom_id: the line's own, if
    readable; param: the field it is about; response: the server's answer to the body, where that
    was read.
    """

    def __init__(
        self,
        code: str,
        message: str,
        custom_id: str | None = None,
        *,
        param: str | None = None,
        response: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id
        self.param = param
        self.response = response

    @classmethod
    def of(cls, error: ApiError, line: Line, request_id: str) -> LineError:
        response = None
        if line.endpoint is not None:
            response = http_response(error.status, request_id, error.openai())
        return cls(
            error.code or "invalid_request",
            error.message,
            line.custom_id,
            param=error.param,
            response=response,
        )


@dataclasses.dataclass(frozen=True)
class Line:
    """One line's request, not checked yet. endpoint: whose body it is; None is a plain line."""

    number: int
    custom_id: str | None
    endpoint: Endpoint | None
    body: Mapping[str, Any]


def parse_line(raw: bytes, number: int) -> Line:
    """Raises LineError."""
    if len(raw) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"{len(raw)} bytes, wanted at most {MAX_LINE_BYTES}")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise LineError("invalid_json", f"not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_line", f"got {shown(value)}, wanted an object")
    custom_id = None
    try:
        custom_id = _custom_id(value)
        if "body" in value or "url" in value or "method" in value:
            return _parse_openai(value, number, custom_id)
    except RequestError as e:
        raise LineError("invalid_request", str(e), custom_id) from None
    fields = {k: v for k, v in value.items() if k not in ("id", "custom_id")}
    return Line(number, custom_id, None, fields)


def _custom_id(value: Mapping[str, Any]) -> str | None:
    given = value.get("custom_id", value.get("id"))
    if given is None:
        return None
    if not isinstance(given, str) or not 0 < len(given) <= 512:
        raise RequestError(f"custom_id: got {shown(given)}, wanted text of 1 to 512 characters")
    return given


def _parse_openai(value: Mapping[str, Any], number: int, custom_id: str | None) -> Line:
    if custom_id is None:
        raise RequestError("custom_id: missing; every line of this format needs one")
    for name in value:
        if name not in _ENVELOPE:
            raise RequestError(f"unknown field {name!r}; wanted {', '.join(_ENVELOPE)}")
    if value.get("method", "POST") != "POST":
        raise RequestError(f"method: got {shown(value['method'])}, wanted POST")
    url = value.get("url")
    if url not in URLS:
        raise RequestError(f"url: got {shown(url)}, wanted one of {', '.join(URLS)}")
    body = value.get("body")
    if not isinstance(body, dict):
        raise RequestError(f"body: got {shown(body)}, wanted an object")
    return Line(number, custom_id, URLS[url], body)


def http_response(status: int, request_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": request_id, "body": body}


def record_head(number: int, custom_id: str | None) -> dict[str, Any]:
    return {"id": f"batch_req_{number}", "line": number, "custom_id": custom_id}


def error_record(number: int, error: LineError) -> dict[str, Any]:
    """`error` is there also where the response holds one, so that one look tells good from bad."""
    return {
        **record_head(number, error.custom_id),
        "response": error.response,
        "error": {"code": error.code, "message": str(error), "param": error.param},
    }
