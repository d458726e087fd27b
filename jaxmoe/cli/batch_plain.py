"""Plain lines of a batch: {"prompt": ...} or {"messages": ...} with sampling parameters beside it.

They are `LLM.generate` and `LLM.chat` in a file: the fields are those of `SamplingParams`, answers
are texts as they were written, with token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.cli.batch_lines import Line, record_head
from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import nearest, rules, shown
from jaxmoe.llm import LLM
from jaxmoe.request import CompletionOutput, RequestOutput
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.generation import Job


@dataclasses.dataclass(frozen=True)
class PlainRequest:
    """prompts: texts or token ids, or the messages of one conversation."""

    prompts: tuple[Any, ...]
    is_chat: bool
    params: SamplingParams
    template_args: Mapping[str, Any]

    def jobs(self, llm: LLM, request_id: str) -> list[Job]:
        """Tokenizes; RequestError for what cannot be."""
        return [
            Job(f"{request_id}-{at}", self._ids(llm, prompt), self.params)
            for at, prompt in enumerate(self.prompts)
        ]

    def _ids(self, llm: LLM, prompt: Any) -> Sequence[int]:
        if self.is_chat:
            return llm.chat_prompt(prompt, **self.template_args)
        return llm.prompt_ids(prompt)


def plain_request(fields: Mapping[str, Any], base: SamplingParams) -> PlainRequest:
    """Checks a line's fields; `base` holds the parameters that they may override."""
    fields = dict(fields)
    is_chat = "messages" in fields
    if "prompt" not in fields and not is_chat:
        raise RequestError("prompt: missing; wanted prompt or messages")
    if "prompt" in fields and is_chat:
        raise RequestError("prompt: not together with messages")
    prompt = fields.pop("messages" if is_chat else "prompt")
    template_args = fields.pop("chat_template_kwargs", None) if is_chat else None
    if not isinstance(template_args, (dict, type(None))):
        raise RequestError(f"chat_template_kwargs: got {shown(template_args)}, wanted an object")
    prompts = (prompt,) if is_chat else _prompts(prompt)
    return PlainRequest(prompts, is_chat, _params(fields, base), template_args or {})


def _prompts(prompt: Any) -> tuple[Any, ...]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt: got {shown(prompt)}, wanted text or token ids")
    if all(isinstance(p, (str, list)) for p in prompt):
        return tuple(prompt)
    return (prompt,)


def _params(fields: Mapping[str, Any], base: SamplingParams) -> SamplingParams:
    """Null means not given."""
    given = {name: value for name, value in fields.items() if value is not None}
    known = rules(SamplingParams)
    for name in given:
        if name not in known:
            raise RequestError(f"unknown field {name!r}{nearest(name, known)}")
    if isinstance(bias := given.get("logit_bias"), dict):
        given["logit_bias"] = {_token_id(k): v for k, v in bias.items()}
    return SamplingParams.of(given, base)


def _token_id(key: str) -> Any:
    """JSON's keys are text."""
    return int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key


def plain_record(line: Line, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    completions = [c for output in outputs for c in output.outputs]
    choices = [_choice(i, c) for i, c in enumerate(completions)]
    first = {k: v for k, v in choices[0].items() if k != "index"}
    prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
    completion_tokens = sum(len(c.token_ids) for c in completions)
    return {
        **record_head(line.number, line.custom_id),
        **first,
        **({"choices": choices} if len(choices) > 1 else {}),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "timings": dataclasses.asdict(completions[0].timings),
        "error": None,
    }


def _choice(index: int, c: CompletionOutput) -> dict[str, Any]:
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
