"""What is asked (`Request`), how far it has come (`Sequence`) and what was answered
(`RequestOutput`).

A request is immutable. It becomes `n` sequences, which the scheduler and the engine move along;
nobody else changes one. What it does not do: hold text (that is text/detokenizer.py) or arrays.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Any, Literal, Protocol

from jaxmoe.common.timing import Timings
from jaxmoe.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error", "abort"]
NOT_FINITE = "the model's logits are not finite"


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated request: everything that was left open (max_tokens, seed, ends) is resolved.

    max_tokens: fits the context. stop_ids: end-of-text ids (unless ignored) and the request's own.
    cache_salt: the request shares cached prefixes only with those of the same salt.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int
    arrival_s: float
    prompt: str | None = None
    cache_salt: str | None = None


class Grammar(Protocol):
    """Where a sequence is in its grammar (sampling/grammar.py)."""

    complete: bool
    error: str | None

    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def mask(self, banned: Collection[int] = ()) -> Any: ...
    def accept(self, token: int) -> None: ...


class Status(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Sequence:
    """One completion of a request on its way.

    choice_idx: which of the request's n. num_computed: tokens whose keys and values are in the
    cache. pages: ids of the cache pages it holds, in order of position. slot: its row in
    per-sequence device state, or -1. grammar: what its text must follow, or None. is_new: whether
    no step has had it in that slot yet. num_cached: prompt tokens that were found in the prefix
    cache when it was first admitted; -1 before. page_keys: of the prompt's whole pages, once they
    were asked for. state_from: the slot of a kept state that its first step starts from, or -1.
    guesses: of the tokens after its last one, to be verified (decode/drafting.py).
    num_known_pages: of its prompt when it was admitted, whether or not their state was kept.
    prefill_path, predicted_ttft_s: which way its prompt was begun (scheduler/prefill_route.py) and
    what was expected of it, time in the queue included; empty where there is one way only.
    """

    request: Request
    choice_idx: int = 0
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    status: Status = Status.WAITING
    num_computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    slot: int = -1
    is_new: bool = True
    num_cached: int = -1
    page_keys: list[bytes] | None = None
    state_from: int = -1
    num_known_pages: int = 0
    num_preemptions: int = 0
    started_s: float = 0.0
    first_token_s: float = 0.0
    prefill_path: str = ""
    predicted_ttft_s: float = 0.0
    grammar: Grammar | None = None
    guesses: Seq[int] = ()

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt's log probabilities have to be computed: once a request."""
        wanted = self.request.params.prompt_logprobs is not None and self.choice_idx == 0
        return wanted and not self.output_token_ids

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return self.num_prompt + len(self.output_token_ids)

    def token(self, position: int) -> int:
        """The token at a position of prompt + output."""
        n = self.num_prompt
        return (
            self.request.prompt_token_ids[position]
            if position < n
            else self.output_token_ids[position - n]
        )


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log probabilities at one output position, of the model's raw distribution (before penalties,
    temperature and truncation). `top` holds (token id, logprob), likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one step added to one completion. The last one carries the finish_reason.

    stop_reason: as of CompletionOutput, with the finish_reason.
    output: the whole answer, on the last delta of the request's last completion. prompt_logprobs:
    where asked for, on the first delta of the first completion: one entry a prompt token, None for
    the first one, which nothing comes before.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One finished completion.

    stop_reason: the stop string or token id that ended it, what failed ("error"), or None for
    end-of-text or length. logprobs: one entry a token where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """All n completions of a request, by index. prompt_logprobs: as on the first delta."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text


def failure(ended: CompletionOutput | Delta) -> str:
    """Why a completion ended with finish_reason "error", for people."""
    return str(ended.stop_reason or f"{NOT_FINITE}; the checkpoint may be damaged")
