"""A loaded engine as its loader hands it over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxmoe.engine.async_engine import EngineInfo
from jaxmoe.engine.engine import Engine

OnStage = Callable[[str, float], None]  # what is being done, and how many percent of it are


@dataclasses.dataclass(frozen=True)
class Ready:
    """close: gives the engine's memory back."""

    engine: Engine
    info: EngineInfo
    close: Callable[[], None] = lambda: None
