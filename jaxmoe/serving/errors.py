"""Errors as clients see them: a status, and a body in OpenAI's or Anthropic's shape.

Whatever is raised while a request is served becomes an `ApiError` here; only what nobody foresaw
is a 500, with the request's id to look it up in the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxmoe.common.errors import CapacityError, EngineDeadError, RequestError

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    **dict.fromkeys((400, 405, 415), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Messages of checks begin with the field they are about ("top_p: got 2, wanted ...").
_PARAM = re.compile(r"([a-z_][a-zA-Z0-9_]*(?:\[\d+\]|\.[a-zA-Z0-9_]+)*): ")


class ApiError(Exception):
    """An answer that is an error. param: the field it is about; code: a word for programs;
    retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, round(self.retry_after_s))).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def openai(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _OPENAI_TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self, request_id: str | None = None) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
        return {
            "type": "error",
            "error": {"type": kind, "message": self.message},
            "request_id": request_id,
        }


def bad_field(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field; the message names it."""
    text = message if message.startswith(param) else f"{param}: {message}"
    return ApiError(400, text, param=param, code=code)


def as_api_error(error: BaseException, *, engine_is_up: bool = True) -> ApiError | None:
    """The answer to an exception raised on purpose; None for a bug.

    engine_is_up: tells a full queue (429) from an engine that is loading or draining (503).
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        found = _PARAM.match(str(error))
        param = found.group(1) if found else None
        code = "context_length_exceeded" if "max_model_len" in str(error) else None
        return ApiError(400, str(error), param=param, code=code)
    if isinstance(error, CapacityError):
        if engine_is_up:
            return ApiError(429, str(error), code="queue_full", retry_after_s=1.0)
        return ApiError(503, str(error), code="not_ready", retry_after_s=5.0)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_down", retry_after_s=10.0)
    return None


# How the engine speaks of the prompt as a whole.
_PROMPT = re.compile(r"the prompt |prompt (?:token ids:|\()")


def renamed(error: RequestError, names: Mapping[str, str]) -> ApiError:
    """The answer to an error of the engine or of a template, with the client's name for the field
    it is about. names: by the engine's; what is not in it has one name for both.
    """
    answer = as_api_error(error)
    assert answer is not None
    if answer.param is not None:
        head = re.split(r"[.\[]", answer.param)[0]
        if head in names:
            rest = answer.message[len(head) :]
            answer.param = names[head] + answer.param[len(head) :]
            answer.message = names[head] + rest
    elif "prompt" in names and _PROMPT.match(answer.message):
        answer.param = names["prompt"]
        answer.message = f"{answer.param}: {answer.message}"
    return answer


def internal_error(request_id: str) -> ApiError:
    return ApiError(
        500,
        f"an error inside the server; request id {request_id} finds it in the server's log",
        code="internal_error",
    )
