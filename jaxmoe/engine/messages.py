"""What passes between a front and the thread or process that steps an engine.

Commands go down, events come up; both are immutable. How they cross a socket is channel.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from jaxmoe.common.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    JaxMoeError,
    RequestError,
)
from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams

ErrorKind = Literal["request", "capacity", "dead", "config", "checkpoint", "other"]
ERRORS: dict[ErrorKind, type[JaxMoeError]] = {
    "request": RequestError,
    "capacity": CapacityError,
    "dead": EngineDeadError,
    "config": ConfigError,
    "checkpoint": CheckpointError,
    "other": JaxMoeError,
}


@dataclasses.dataclass(frozen=True)
class AddRequest:
    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str | None = None


@dataclasses.dataclass(frozen=True)
class AbortRequest:
    request_id: str


@dataclasses.dataclass(frozen=True)
class Stop:
    """No step follows. What still runs is dropped: abort it first."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """A request that was refused; nothing else follows for it."""

    request_id: str
    kind: ErrorKind
    message: str

    @classmethod
    def of(cls, request_id: str, error: JaxMoeError) -> Failed:
        return cls(request_id, error_kind(error), str(error))

    def error(self) -> JaxMoeError:
        return ERRORS[self.kind](self.message)


@dataclasses.dataclass(frozen=True)
class Configure:
    """The first message to an engine process: `EngineConfig`'s fields."""

    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far loading is."""

    stage: str
    percent: float


@dataclasses.dataclass(frozen=True)
class Started:
    """Requests are taken from now on. stat_names: of the figures in the pulse, in their order."""

    info: EngineInfo
    stat_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fatal:
    """The last message of an engine process that ends itself."""

    kind: ErrorKind
    message: str


@dataclasses.dataclass(frozen=True)
class PrefillReady:
    """The first message of a prefill process (prefill_process.py): prompts are taken from now on.

    store: name of the experts' shared memory. total_bytes: that a pass streams. The seconds are
    those of scheduler/prefill_route.py.
    """

    store: str
    max_tokens: int
    num_layers: int
    total_bytes: int
    pass_s: float
    streamed_token_s: float
    chunked_token_s: float
    source: str
    report: str


@dataclasses.dataclass(frozen=True)
class BeginPrompt:
    """A prompt's tokens from position `start` on, of a sequence with so many pages. checksums: of
    the pages before, one for every layer, in the shared pages; empty where there are none.
    """

    job: int
    start: int
    token_ids: tuple[int, ...]
    num_pages: int
    checksums: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DropPrompt:
    job: int


@dataclasses.dataclass(frozen=True)
class SetPace:
    """Of streaming from now on; 0: as fast as it goes."""

    bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class LayerDone:
    """The layer's pages are in the shared ones."""

    job: int
    layer: int
    checksum: int


@dataclasses.dataclass(frozen=True)
class PromptEnded:
    """Nothing more is written for it. failure: why it was not computed."""

    job: int
    failure: str | None = None


def error_kind(error: BaseException) -> ErrorKind:
    for kind, known in ERRORS.items():
        if isinstance(error, known):
            return kind
    return "other"


Command: TypeAlias = AddRequest | AbortRequest | Stop
Event: TypeAlias = Delta | PrefillProgress | Failed
PrefillCommand: TypeAlias = BeginPrompt | DropPrompt | SetPace
PrefillEvent: TypeAlias = PrefillReady | LayerDone | PromptEnded
Message: TypeAlias = (
    Command | Event | Configure | Stage | Started | Fatal | PrefillCommand | PrefillEvent
)
