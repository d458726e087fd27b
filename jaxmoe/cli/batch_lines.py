"""The lines of an offline batch: what a line asks, and the record that answers it.

Two kinds of lines: OpenAI's batch format ({"custom_id", "method", "url", "body"}, answered in its
response format) and plain ones ({"prompt": ...} or {"messages": ...} with sampling parameters
beside it). A line that is wrong gets a record with an `error`; other lines are not affected. What
it does not do: files, engines.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import nearest, rules, shown
from jaxmoe.request import CompletionOutput, RequestOutput, TokenLogprob
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.text.tokenizer import Tokenizer

MAX_LINE_BYTES = 32 << 20
URLS = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
# Fields of OpenAI's bodies that change nothing here; the value must be one that asks for nothing.
_IGNORED = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
    "safety_identifier",
}
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
}


class LineError(RequestError):
    """A line that cannot be answered. code: a word for programs; custom_id: the line's own,
    if readable.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@dataclasses.dataclass(frozen=True)
class Item:
    """One line's request. prompts: texts or token ids, or the messages of one conversation.

    form: how the answer is written: "plain", "completion" or "chat".
    """

    line: int
    custom_id: str | None
    form: str
    prompts: tuple[Any, ...]
    is_chat: bool
    params: SamplingParams
    template_args: Mapping[str, Any]


def parse_line(raw: bytes, line: int, base: SamplingParams) -> Item:
    """Checks a line; `base` holds the parameters that the line may override."""
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
            return _parse_openai(value, line, custom_id, base)
        fields = {k: v for k, v in value.items() if k not in ("id", "custom_id")}
        return _parse_body(fields, line, custom_id, base, "plain", "messages" in fields)
    except LineError:
        raise
    except RequestError as e:
        raise LineError("invalid_request", str(e), custom_id) from None


def _custom_id(value: Mapping[str, Any]) -> str | None:
    given = value.get("custom_id", value.get("id"))
    if given is None:
        return None
    if not isinstance(given, str) or not 0 < len(given) <= 512:
        raise RequestError(f"custom_id: got {shown(given)}, wanted text of 1 to 512 characters")
    return given


def _parse_openai(
    value: Mapping[str, Any], line: int, custom_id: str | None, base: SamplingParams
) -> Item:
    if custom_id is None:
        raise RequestError("custom_id: missing; every line of this format needs one")
    for name in value:
        if name not in ("custom_id", "method", "url", "body"):
            raise RequestError(f"unknown field {name!r}; wanted custom_id, method, url, body")
    if value.get("method", "POST") != "POST":
        raise RequestError(f"method: got {shown(value['method'])}, wanted POST")
    url = value.get("url")
    if url not in URLS:
        raise RequestError(f"url: got {shown(url)}, wanted one of {', '.join(URLS)}")
    body = value.get("body")
    if not isinstance(body, dict):
        raise RequestError(f"body: got {shown(body)}, wanted an object")
    return _parse_body(body, line, custom_id, base, URLS[url], URLS[url] == "chat")


def _parse_body(
    body: Mapping[str, Any],
    line: int,
    custom_id: str | None,
    base: SamplingParams,
    form: str,
    is_chat: bool,
) -> Item:
    fields = dict(body)
    for name in _IGNORED:
        fields.pop(name, None)
    for name, harmless in _NOT_HERE.items():
        if name in fields and fields.pop(name) not in harmless:
            raise RequestError(f"{name}: got {shown(body[name])}, which is not supported here")
    wanted, other = ("messages", "prompt") if is_chat else ("prompt", "messages")
    if wanted not in fields:
        raise RequestError(f"{wanted}: missing")
    if other in fields:
        raise RequestError(f"{other}: not together with {wanted}")
    prompt = fields.pop(wanted)
    template_args = fields.pop("chat_template_kwargs", None) if is_chat else None
    if not isinstance(template_args, (dict, type(None))):
        raise RequestError(f"chat_template_kwargs: got {shown(template_args)}, wanted an object")
    return Item(
        line=line,
        custom_id=custom_id,
        form=form,
        prompts=(prompt,) if is_chat else _prompts(prompt),
        is_chat=is_chat,
        params=_params(fields, form, base),
        template_args=template_args or {},
    )


def _prompts(prompt: Any) -> tuple[Any, ...]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt: got {shown(prompt)}, wanted text or token ids")
    if all(isinstance(p, (str, list)) for p in prompt):
        return tuple(prompt)
    return (prompt,)


def _params(fields: dict[str, Any], form: str, base: SamplingParams) -> SamplingParams:
    """Sampling parameters of a body: null means not given; OpenAI's spellings are understood."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "max_completion_tokens" in given:
        given.setdefault("max_tokens", given["max_completion_tokens"])
        del given["max_completion_tokens"]
    if form == "chat":
        asked, top = given.pop("logprobs", False), given.pop("top_logprobs", None)
        if not isinstance(asked, bool):
            raise RequestError(f"logprobs: got {shown(asked)}, wanted true or false")
        if top is not None and not asked:
            raise RequestError("top_logprobs: needs logprobs to be true")
        if asked:
            given["logprobs"] = 0 if top is None else top
    if isinstance(bias := given.get("logit_bias"), dict):
        given["logit_bias"] = {_token_id(k): v for k, v in bias.items()}
    known = rules(SamplingParams)
    for name in given:
        if name not in known:
            raise RequestError(f"unknown field {name!r}{nearest(name, known)}")
    return SamplingParams.of(given, base)


def _token_id(key: str) -> Any:
    """JSON's keys are text."""
    return int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key


def error_record(line: int, error: LineError) -> dict[str, Any]:
    return {
        "id": f"batch_req_{line}",
        "line": line,
        "custom_id": error.custom_id,
        "response": None,
        "error": {"code": error.code, "message": str(error)},
    }


def record(
    item: Item, outputs: Sequence[RequestOutput], model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The answer to a line, in the form it was asked in."""
    completions = [c for output in outputs for c in output.outputs]
    n = item.params.n
    usage = _usage(outputs, completions)
    head = {"id": f"batch_req_{item.line}", "line": item.line, "custom_id": item.custom_id}
    if item.form == "plain":
        choices = [_plain_choice(i, c) for i, c in enumerate(completions)]
        first = {k: v for k, v in choices[0].items() if k != "index"}
        return {
            **head,
            **first,
            **({"choices": choices} if len(choices) > 1 else {}),
            "usage": usage,
            "timings": dataclasses.asdict(completions[0].timings),
            "error": None,
        }
    assert n * len(outputs) == len(completions)
    make = _chat_choice if item.form == "chat" else _completion_choice
    body = {
        "id": f"{'chatcmpl' if item.form == 'chat' else 'cmpl'}-{outputs[0].request_id}",
        "object": "chat.completion" if item.form == "chat" else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [make(i, c, tokenizer) for i, c in enumerate(completions)],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": outputs[0].request_id, "body": body}
    return {**head, "response": response, "error": None}


def _usage(outputs: Sequence[RequestOutput], completions: Sequence[CompletionOutput]) -> Any:
    prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
    completion_tokens = sum(len(c.token_ids) for c in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _plain_choice(index: int, c: CompletionOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": c.text,
        "token_ids": c.token_ids,
        "finish_reason": c.finish_reason,
        "stop_reason": c.stop_reason,
    }
    if c.logprobs is not None:
        choice["logprobs"] = [
            {"token_id": e.token_id, "logprob": e.logprob, "top": e.top} for e in c.logprobs
        ]
    return choice


def _completion_choice(
    index: int, c: CompletionOutput, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    logprobs = None
    if c.logprobs is not None:
        tokens = [_token(e.token_id, tokenizer) for e in c.logprobs]
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token)
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [e.logprob for e in c.logprobs],
            "top_logprobs": [{_token(i, tokenizer): p for i, p in e.top} for e in c.logprobs],
            "text_offset": offsets,
        }
    return {
        "index": index,
        "text": c.text,
        "logprobs": logprobs,
        "finish_reason": c.finish_reason,
    }


def _chat_choice(index: int, c: CompletionOutput, tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprobs = None
    if c.logprobs is not None:
        logprobs = {"content": [_chat_logprob(e, tokenizer) for e in c.logprobs], "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": c.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": c.finish_reason,
    }


def _chat_logprob(entry: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = b"" if tokenizer is None else tokenizer.token_bytes(token_id)
        return {"token": _token(token_id, tokenizer), "logprob": logprob, "bytes": list(raw)}

    top = [one(i, p) for i, p in entry.top]
    return {**one(entry.token_id, entry.logprob), "top_logprobs": top}


def _token(token_id: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return f"token_id:{token_id}"
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
