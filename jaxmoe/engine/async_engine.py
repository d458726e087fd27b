"""What a server sees of an engine: requests in, deltas out, without blocking its event loop.

`AsyncEngine` is the seam between the front process and whatever runs the steps: an engine in a
thread of the same process, or one in a process of its own behind a channel. Front code is written
and tested against this protocol alone. What it does not do: HTTP, templates, tokenizing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, Protocol

from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams

State = Literal["loading", "ready", "draining", "restarting", "dead"]


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What does not change while an engine lives; known once it is ready.

    eos_token_ids: end of text unless a request ignores it. default_params: what requests that say
    nothing get; default_max_tokens: their longest output where the room allows it. has_tokenizer:
    whether deltas carry text. report: the start-up report, for people.
    store_name: of the shared memory with the experts, if there is one.
    """

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    page_size: int
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams
    report: str
    default_max_tokens: int | None = None
    has_tokenizer: bool = True
    store_name: str | None = None


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """How an engine is. stage and percent: of loading or draining, for people waiting. error: why
    it is restarting or dead.
    """

    state: State
    stage: str = ""
    percent: float = 0.0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class PrefillProgress:
    """How much of a request's prompt is computed (or was found in the prefix cache).

    layer, num_layers: of the streamed pass under way, and how many it has; 0 between passes and for
    chunks. left_s: until the whole prompt is computed, as far as is known; 0: that is not known.
    """

    request_id: str
    computed_tokens: int
    prompt_tokens: int
    layer: int = 0
    num_layers: int = 0
    left_s: float = 0.0


class AsyncEngine(Protocol):
    """Methods are called on one event loop; none of them blocks it."""

    @property
    def info(self) -> EngineInfo:
        """Raises EngineDeadError or CapacityError while there is none (see `status`)."""
        ...

    def status(self) -> EngineStatus: ...

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges, at most 0.1 s old: names as in /metrics without their prefix."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta | PrefillProgress]:
        """The request's deltas, with progress between them while its prompt is computed.

        Ends after the delta that carries `output`. Leaving it early (aclose, cancellation) ends the
        request wherever it is: queued, in prefill, or decoding. cache_salt: requests share cached
        prefixes only under the same salt.

        Raises: RequestError (what was asked cannot be served), CapacityError (the queue is full, or
        the engine is loading, draining or restarting), EngineDeadError (it died meanwhile).
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request; its iterator ends with finish_reason "abort". Unknown ids do nothing."""
        ...

    async def close(self, drain_s: float = 0.0) -> None:
        """Takes no more requests, lets running ones finish for `drain_s`, aborts the rest."""
        ...
