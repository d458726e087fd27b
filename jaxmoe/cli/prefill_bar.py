"""A bar for prompts that take a while, on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from jaxmoe.engine.async_engine import PrefillProgress


class PrefillBar:
    """Called as `LLM.generate`'s on_prefill: prompts' tokens, the layer of a streamed one, the time
    left.

    num_tokens: of all prompts. show: default: where a person can see it. delay_s: prompts that are
    computed sooner have no bar.
    """

    def __init__(self, num_tokens: int, show: bool | None = None, delay_s: float = 1.0) -> None:
        show = sys.stderr.isatty() if show is None else show
        self._done: dict[str, int] = {}
        self._bar = tqdm(
            total=num_tokens,
            desc="prompt",
            unit="tok",
            disable=not show,
            file=sys.stderr,
            leave=False,
            delay=delay_s,
            bar_format="{desc}: {n_fmt}/{total_fmt} tokens |{bar}| {elapsed}{postfix}",
        )

    def __call__(self, progress: PrefillProgress) -> None:
        self._done[progress.request_id] = progress.computed_tokens
        said = []
        if progress.num_layers:
            said.append(f"layer {progress.layer} of {progress.num_layers}")
        if progress.left_s > 0:
            said.append(f"{progress.left_s:.0f} s left")
        self._bar.set_postfix_str(", ".join(said), refresh=False)
        done = sum(self._done.values())
        self._bar.update(done - self._bar.n)
        if done >= (self._bar.total or 0):
            self.close()  # what follows is the text

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
