"""One prompt at a time through the streamed layers, a layer a call, for an engine that has other
work in between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

import jax

from jaxmoe.decode.batch import StepRow
from jaxmoe.scheduler.prefill_route import Path

Caches = Callable[[], list[tuple[jax.Array, ...]]]


class LayerByLayer(Protocol):
    """`SlpPrefill`, or `DslpPrefill`."""

    on_compile: Callable[[bool], None]

    @property
    def max_tokens(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def layers(self, row: StepRow, caches: Caches) -> Generator[int, None, jax.Array]: ...
    def close(self) -> None: ...


class PromptStream:
    """ways: what computes a prompt, by path. caches: the page arrays of every layer as they are
    now.
    """

    def __init__(self, ways: Mapping[Path, LayerByLayer], caches: Caches) -> None:
        self.ways, self._caches = dict(ways), caches
        self._run: Generator[int, None, Any] | None = None
        self._num_layers = 0

    def on_compile(self, call: Callable[[bool], None]) -> None:
        """Whom to tell when programs are compiled that the steps wait for, and when they are."""
        for way in self.ways.values():
            way.on_compile = call

    @property
    def num_layers(self) -> int:
        """Of the prompt under way, or the last."""
        return self._num_layers

    def begin(self, row: StepRow, path: Path) -> None:
        """Starts with the row's tokens; what was under way is dropped."""
        self.stop()
        way = self.ways[path]
        self._run, self._num_layers = way.layers(row, self._caches), way.num_layers

    def advance(self) -> float:
        """Computes one more layer: which fraction of the layers is done, 1 at the end.

        Raises: ffi.registry.NATIVE_ERRORS where the weights could not be loaded; this prompt is
        dropped then, the next may begin.
        """
        assert self._run is not None, "nothing has begun"
        try:
            done = next(self._run)
        except StopIteration:
            self._run = None
            return 1.0
        except BaseException:
            self._run = None
            raise
        return done / (self._num_layers + 1)

    def stop(self) -> None:
        """Drops the prompt under way, if any."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def close(self) -> None:
        self.stop()
        for way in self.ways.values():
            way.close()
