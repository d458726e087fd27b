"""How the tokens of one request are chosen and when it ends. Every number has both bounds, checked
here.

Order of application: repetition, presence and frequency penalties and logit_bias, then the mask of
a grammar, then temperature, top_k, top_p, min_p, then the draw. What it does not do: know a model
(ids are checked against the vocabulary by the engine).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import Rule, check_fields, check_value, checked, nearest, rules, shown
from jaxmoe.structured_output import StructuredOutput

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_EOS_TOKEN_IDS = 128  # a checkpoint's own
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKEN_ID = 2**31 - 2

_TOKEN_ID = Rule("int", "a token id", low=0, high=MAX_TOKEN_ID)
_BIAS = Rule("float", "added to a logit", low=-100.0, high=100.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Immutable and validated: a wrong value raises RequestError naming the field."""

    n: int = checked(1, "int", "completions of each prompt", low=1, high=128)
    temperature: float = checked(
        1.0, "float", "0 is greedy; higher is more varied", low=0.0, high=100.0
    )
    top_k: int = checked(
        0, "int", "draw from the k likeliest tokens only; 0 or -1 is off", low=-1, high=2**31 - 1
    )
    top_p: float = checked(
        1.0,
        "float",
        "draw from the smallest set of likeliest tokens with this much probability",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    min_p: float = checked(
        0.0, "float", "drop tokens below this share of the likeliest one's", low=0.0, high=1.0
    )
    seed: int | None = checked(
        None,
        "int",
        "same seed, same text, whatever else is in the batch",
        low=0,
        high=2**64 - 1,
        optional=True,
    )
    max_tokens: int | None = checked(
        None,
        "int",
        "longest completion; default: the checkpoint's max_new_tokens, or the room that the "
        "context has left",
        low=1,
        high=2**31 - 1,
        optional=True,
    )
    min_tokens: int = checked(
        0, "int", "no end of text and no stop before this many tokens", low=0, high=2**31 - 1
    )
    stop: tuple[str, ...] = checked((), "other", f"up to {MAX_STOPS} strings that end the text")
    stop_token_ids: tuple[int, ...] = checked((), "other", "token ids that end the text")
    include_stop_str_in_output: bool = checked(
        False, "bool", "keep the stop string at the end of the text"
    )
    ignore_eos: bool = checked(False, "bool", "go on after the model's end-of-text tokens")
    repetition_penalty: float = checked(
        1.0,
        "float",
        "above 1 makes tokens of prompt and output less likely",
        low=0.01,  # logits are divided by it: much less overflows float32
        high=100.0,
    )
    presence_penalty: float = checked(
        0.0, "float", "taken off the logits of tokens already written", low=-2.0, high=2.0
    )
    frequency_penalty: float = checked(
        0.0, "float", "the same, times how often they were written", low=-2.0, high=2.0
    )
    logit_bias: tuple[tuple[int, float], ...] = checked(
        (), "other", "map of token id to a number from -100 to 100 added to its logit"
    )
    logprobs: int | None = checked(
        None,
        "int",
        "log probabilities of the chosen token and of so many likeliest ones, before any of the "
        "adjustments above",
        low=0,
        high=MAX_LOGPROBS,
        optional=True,
    )
    prompt_logprobs: int | None = checked(
        None,
        "int",
        "log probabilities of the prompt's own tokens, each given those before it, and of so many "
        "likeliest ones in its place; the whole prompt is computed for them",
        low=0,
        high=MAX_LOGPROBS,
        optional=True,
    )
    skip_special_tokens: bool = checked(True, "bool", "leave control tokens out of the text")
    structured: StructuredOutput | None = None  # a grammar for the text; no flag, built by callers

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_("top_k", max(self.top_k, 0))
        set_("stop", _stop_strings(self.stop))
        set_("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        set_("logit_bias", _logit_bias(self.logit_bias))
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            set_("structured", StructuredOutput.from_json(self.structured))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: got {self.min_tokens}, wanted at most max_tokens ({self.max_tokens})"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any], base: SamplingParams | None = None) -> SamplingParams:
        """`base` (or the defaults) with the `given` fields replaced; an unknown name is a
        RequestError.
        """
        known = rules(cls)
        for name in given:
            if name not in known and name != "structured":
                raise RequestError(
                    f"unknown sampling parameter {name!r}{nearest(name, known)}; known: "
                    + ", ".join(known)
                )
        return dataclasses.replace(base or cls(), **given)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def adjusts_logits(self) -> bool:
        """Whether a step that samples this request needs token counts or biases."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


def _stop_strings(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, Iterable) or isinstance(stops, (bytes, Mapping)):
        raise RequestError(f"stop: got {shown(given)}, wanted a string or a list of strings")
    stops = tuple(stops)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop: got {len(stops)} strings, wanted at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise RequestError(
                f"stop: got {shown(stop)}, wanted strings of 1 to {MAX_STOP_CHARS} characters"
            )
    return stops


def _stop_token_ids(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise RequestError(f"stop_token_ids: got {shown(given)}, wanted a list of token ids")
    ids = tuple(check_value("stop_token_ids", i, _TOKEN_ID, RequestError) for i in given)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids: got {len(ids)} ids, wanted at most {MAX_STOP_TOKEN_IDS}"
        )
    return ids


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    if given is None:
        return ()
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        pairs = [(i, b) for i, b in pairs]
    except (TypeError, ValueError):
        raise RequestError(
            f"logit_bias: got {shown(given)}, wanted a map of token id to number"
        ) from None
    if len(pairs) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias: got {len(pairs)} entries, wanted at most {MAX_LOGIT_BIAS}")
    out = {
        check_value("logit_bias", i, _TOKEN_ID, RequestError): check_value(
            "logit_bias", b, _BIAS, RequestError
        )
        for i, b in pairs
    }
    return tuple(sorted(out.items()))
