"""Messages as JSON arrays and back, checked: [tag, field, field, ...].

Every message has its two functions here; nothing is decoded that is not written out, and nothing
but plain JSON values is ever made, so a broken or hostile peer can cause a ChannelError and
nothing else. Sampling parameters are checked by their own constructor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import orjson

from jaxmoe.common.errors import EngineDeadError, JaxMoeError
from jaxmoe.common.fields import shown
from jaxmoe.common.timing import Timings
from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.engine.messages import (
    ERRORS,
    AbortRequest,
    AddRequest,
    BeginPrompt,
    Configure,
    DropPrompt,
    Failed,
    Fatal,
    LayerDone,
    Message,
    PrefillReady,
    PromptEnded,
    SetPace,
    Stage,
    Started,
    Stop,
)
from jaxmoe.request import CompletionOutput, Delta, RequestOutput, TokenLogprob
from jaxmoe.sampling_params import SamplingParams

MAX_ID_CHARS = 256
MAX_TEXT_CHARS = 1 << 26
MAX_ITEMS = 1 << 24  # of any list: the longest context
_MAX_TOKEN_ID = 2**31 - 1
_REASONS = ("stop", "length", "error", "abort")
T = TypeVar("T")


class ChannelError(EngineDeadError):
    """What came is no message."""


def encode(message: Message) -> bytes:
    tag, to_fields, _ = _CODECS[type(message)]
    return orjson.dumps([tag, *to_fields(message)])


def decode(data: bytes | memoryview) -> Message:
    """Raises ChannelError for anything that `encode` would not have written."""
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as e:
        raise ChannelError(f"a message is not JSON: {e}") from None
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise ChannelError(f"a message is {shown(values)}, wanted a list with a tag")
    from_fields = _DECODERS.get(values[0])
    if from_fields is None:
        raise ChannelError(f"a message has the unknown tag {shown(values[0])}")
    try:
        return from_fields(*values[1:])
    except (TypeError, ValueError, JaxMoeError) as e:
        raise ChannelError(f"a message {values[0]!r} is malformed: {e}") from None


def _str(value: Any, most: int = MAX_TEXT_CHARS) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"got {shown(value)}, wanted a text of at most {most} characters")
    return value


def _id(value: Any) -> str:
    return _str(value, MAX_ID_CHARS)


def _int(value: Any, high: int = 2**63 - 1, low: int = 0) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"got {shown(value)}, wanted a whole number from {low} to {high}")
    return value


def _token(value: Any) -> int:
    return _int(value, _MAX_TOKEN_ID)


def _float(value: Any) -> float:
    # JSON has no infinities; the only one there is is the log probability of the impossible.
    if value is None:
        return -math.inf
    if type(value) not in (int, float):
        raise ValueError(f"got {shown(value)}, wanted a number")
    return float(value)


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"got {shown(value)}, wanted true or false")
    return value


def _one_of(value: Any, choices: Any) -> Any:
    if value not in choices:
        raise ValueError(f"got {shown(value)}, wanted one of {', '.join(choices)}")
    return value


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _list(read: Callable[[Any], T], value: Any) -> tuple[T, ...]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise ValueError(f"got {shown(value)}, wanted a list of at most {MAX_ITEMS}")
    # Of a list: a tuple made of an iterator grows by steps and is cut at the end, and the holes
    # that leaves in the heap add up over thousands of requests.
    return tuple([read(v) for v in value])


def _tokens(value: Any) -> tuple[int, ...]:
    return _list(_token, value)


# Sampling parameters: what differs from the defaults, by name.


def _params_out(params: SamplingParams) -> dict[str, Any]:
    return {
        f.name: getattr(params, f.name)
        for f in dataclasses.fields(params)
        if getattr(params, f.name) != f.default
    }


def _params_in(value: Any) -> SamplingParams:
    if not isinstance(value, dict):
        raise ValueError(f"got {shown(value)}, wanted sampling parameters")
    return SamplingParams.of(value)


def _logprob_out(entry: TokenLogprob) -> list[Any]:
    return [entry.token_id, entry.logprob, entry.top]


def _logprob_in(value: Any) -> TokenLogprob:
    token, logprob, top = value
    return TokenLogprob(_token(token), _float(logprob), _list(_pair_in, top))


def _pair_in(value: Any) -> tuple[int, float]:
    token, logprob = value
    return _token(token), _float(logprob)


def _logprobs_out(entries: Any) -> Any:
    return None if entries is None else [e and _logprob_out(e) for e in entries]


def _logprobs_in(value: Any) -> tuple[TokenLogprob, ...] | None:
    return _optional(lambda v: _list(_logprob_in, v), value)


def _prompt_logprobs_in(value: Any) -> tuple[TokenLogprob | None, ...] | None:
    return _optional(lambda v: _list(lambda e: _optional(_logprob_in, e), v), value)


_TIMINGS = tuple(f.name for f in dataclasses.fields(Timings))
_COUNTS = {"prompt_tokens", "output_tokens", "cached_tokens"}


def _timings_in(value: Any) -> Timings:
    fields: dict[str, Any] = {
        name: _int(given) if name in _COUNTS else _float(given)
        for name, given in zip(_TIMINGS, value, strict=True)
    }
    return Timings(**fields)


def _stop_reason_in(value: Any) -> str | int | None:
    return _token(value) if type(value) is int else _optional(_str, value)


def _completion_out(c: CompletionOutput) -> list[Any]:
    timings = [getattr(c.timings, name) for name in _TIMINGS]
    reason = c.finish_reason
    logprobs = _logprobs_out(c.logprobs)
    return [c.index, c.text, c.token_ids, reason, c.stop_reason, logprobs, timings]


def _completion_in(value: Any) -> CompletionOutput:
    index, text, ids, reason, stop_reason, logprobs, timings = value
    return CompletionOutput(
        index=_int(index),
        text=_str(text),
        token_ids=_tokens(ids),
        finish_reason=_one_of(reason, _REASONS),
        stop_reason=_stop_reason_in(stop_reason),
        logprobs=_logprobs_in(logprobs),
        timings=_timings_in(timings),
    )


def _output_out(o: RequestOutput) -> list[Any]:
    # prompt_logprobs were on the first delta; the front puts them back (mailboxes.py).
    completions = [_completion_out(c) for c in o.outputs]
    return [o.request_id, o.prompt, o.prompt_token_ids, completions]


def _output_in(value: Any) -> RequestOutput:
    request_id, prompt, ids, completions = value
    return RequestOutput(
        _id(request_id),
        _optional(_str, prompt),
        _tokens(ids),
        _list(_completion_in, completions),
    )


def _delta_out(d: Delta) -> list[Any]:
    return [
        d.request_id,
        d.index,
        d.text,
        d.token_ids,
        _logprobs_out(d.logprobs),
        d.finish_reason,
        d.output and _output_out(d.output),
        _logprobs_out(d.prompt_logprobs),
        d.stop_reason,
    ]


def _delta_in(
    request_id: Any,
    index: Any,
    text: Any,
    ids: Any,
    logprobs: Any,
    reason: Any,
    output: Any,
    prompt_logprobs: Any,
    stop_reason: Any,
) -> Delta:
    return Delta(
        _id(request_id),
        _int(index),
        _str(text),
        _tokens(ids),
        _logprobs_in(logprobs),
        None if reason is None else _one_of(reason, _REASONS),
        _optional(_output_in, output),
        _prompt_logprobs_in(prompt_logprobs),
        _stop_reason_in(stop_reason),
    )


def _info_out(info: EngineInfo) -> dict[str, Any]:
    fields = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return fields | {"default_params": _params_out(info.default_params)}


def _info_in(value: Any) -> EngineInfo:
    numbers = ("vocab_size", "max_model_len", "max_num_seqs", "num_pages", "page_size")
    known = {f.name for f in dataclasses.fields(EngineInfo)}
    if not isinstance(value, dict) or set(value) != known:
        raise ValueError(f"got {shown(value)}, wanted an engine's description")
    return EngineInfo(
        model=_str(value["model"]),
        **{name: _int(value[name], low=1) for name in numbers},
        eos_token_ids=_tokens(value["eos_token_ids"]),
        default_params=_params_in(value["default_params"]),
        report=_str(value["report"]),
        default_max_tokens=_optional(_int, value["default_max_tokens"]),
        has_tokenizer=_bool(value["has_tokenizer"]),
        store_name=_optional(_str, value["store_name"]),
    )


def _options_in(value: Any) -> Configure:
    plain = (str, int, float, bool, type(None))
    if not isinstance(value, dict) or not all(isinstance(v, plain) for v in value.values()):
        raise ValueError(f"got {shown(value)}, wanted engine options")
    return Configure(value)


def _checksum(value: Any) -> int:
    return _int(value, 2**32 - 1)


def _prefill_ready_in(store: Any, tokens: Any, layers: Any, total: Any, *rest: Any) -> PrefillReady:
    pass_s, streamed_s, chunked_s, source, report = rest
    seconds = _float(pass_s), _float(streamed_s), _float(chunked_s)
    sizes = _int(tokens, low=1), _int(layers, low=1), _int(total)
    return PrefillReady(_str(store), *sizes, *seconds, _str(source), _str(report))


_CODECS: dict[type, tuple[str, Callable[[Any], Any], Callable[..., Message]]] = {
    AddRequest: (
        "add",
        lambda m: (m.request_id, m.prompt_token_ids, _params_out(m.params), m.cache_salt),
        lambda request_id, ids, params, salt: AddRequest(
            _id(request_id), _tokens(ids), _params_in(params), _optional(_str, salt)
        ),
    ),
    AbortRequest: ("abort", lambda m: (m.request_id,), lambda i: AbortRequest(_id(i))),
    Stop: ("stop", lambda m: (), Stop),
    Delta: ("delta", _delta_out, _delta_in),
    PrefillProgress: (
        "prefill",
        lambda m: (
            *(m.request_id, m.computed_tokens, m.prompt_tokens),
            *(m.layer, m.num_layers, m.left_s),
        ),
        lambda i, computed, total, layer, layers, left_s: PrefillProgress(
            _id(i), _int(computed), _int(total), _int(layer), _int(layers), _float(left_s)
        ),
    ),
    Failed: (
        "failed",
        lambda m: (m.request_id, m.kind, m.message),
        lambda i, kind, message: Failed(_id(i), _one_of(kind, ERRORS), _str(message)),
    ),
    Configure: ("configure", lambda m: (m.options,), _options_in),
    Stage: (
        "stage",
        lambda m: (m.stage, m.percent),
        lambda stage, percent: Stage(_str(stage), _float(percent)),
    ),
    Started: (
        "started",
        lambda m: (_info_out(m.info), m.stat_names),
        lambda info, names: Started(_info_in(info), _list(_str, names)),
    ),
    Fatal: (
        "fatal",
        lambda m: (m.kind, m.message),
        lambda kind, message: Fatal(_one_of(kind, ERRORS), _str(message)),
    ),
    PrefillReady: ("prefill_ready", dataclasses.astuple, _prefill_ready_in),
    BeginPrompt: (
        "begin_prompt",
        dataclasses.astuple,
        lambda job, start, ids, pages, checksums: BeginPrompt(
            _int(job), _int(start), _tokens(ids), _int(pages, low=1), _list(_checksum, checksums)
        ),
    ),
    DropPrompt: ("drop_prompt", dataclasses.astuple, lambda job: DropPrompt(_int(job))),
    SetPace: ("set_pace", dataclasses.astuple, lambda pace: SetPace(_float(pace))),
    LayerDone: (
        "layer_done",
        dataclasses.astuple,
        lambda job, layer, checksum: LayerDone(_int(job), _int(layer), _checksum(checksum)),
    ),
    PromptEnded: (
        "prompt_ended",
        dataclasses.astuple,
        lambda job, failure: PromptEnded(_int(job), _optional(_str, failure)),
    ),
}
_DECODERS = {tag: from_fields for tag, _, from_fields in cast(Any, _CODECS.values())}
