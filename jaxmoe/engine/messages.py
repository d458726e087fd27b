"""What passes between a front and the thread or process that steps an engine.

Commands go down, events come up; both are immutable. How they cross a socket is channel.py's.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from jaxmoe.common.errors import CapacityError, EngineDeadError, JaxMoeError, RequestError
from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams

ErrorKind = Literal["request", "capacity", "dead", "other"]
ERRORS: dict[ErrorKind, type[JaxMoeError]] = {
    "request": RequestError,
    "capacity": CapacityError,
    "dead": EngineDeadError,
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
        kinds = (kind for kind, known in ERRORS.items() if isinstance(error, known))
        return cls(request_id, next(kinds), str(error))

    def error(self) -> JaxMoeError:
        return ERRORS[self.kind](self.message)


Command: TypeAlias = AddRequest | AbortRequest | Stop
Event: TypeAlias = Delta | PrefillProgress | Failed
