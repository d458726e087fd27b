"""Which way a prompt is computed: in chunks with the experts on the CPU, or streamed.

Chunks cost CPU time by the token; a streamed pass costs at least the time all experts take over the
bus, whatever the prompt's length (paper section 3.1). Both rates begin as estimates and are then
what this machine was seen to do. Pure Python: seconds come in as numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Path = Literal["chunked", "slp"]

# Of a new observation: a few prompts correct a wrong estimate, one odd minute does not.
_WEIGHT = 0.3


@dataclasses.dataclass
class PrefillRoute:
    """Figures are seconds.

    pass_s: all experts over the bus once. streamed_token_s, chunked_token_s: computing a token on
    the device, and in chunks. max_tokens: of one streamed pass. forced: a path for all prompts.
    least_pass_s: of a pass while streaming is throttled, else 0.
    """

    pass_s: float
    streamed_token_s: float
    chunked_token_s: float
    max_tokens: int
    forced: Path | None = None
    least_pass_s: float = 0.0

    def predict_s(self, path: Path, num_tokens: int) -> float:
        """What `num_tokens` take one way."""
        if path == "chunked":
            return num_tokens * self.chunked_token_s
        whole, rest = divmod(num_tokens, self.max_tokens)
        passes = [self.max_tokens] * whole + ([rest] if rest else [])
        least = max(self.pass_s, self.least_pass_s)
        return sum(max(least, n * self.streamed_token_s) for n in passes)

    def choose(self, num_tokens: int) -> Path:
        """The way that is predicted to be faster; chunks where both are equal."""
        if self.forced is not None:
            return self.forced
        streamed = self.predict_s("slp", num_tokens)
        return "slp" if streamed < self.predict_s("chunked", num_tokens) else "chunked"

    def streams(self, num_tokens: int) -> int:
        """How many of so many tokens the next streamed pass is to take; 0: none, use chunks."""
        if num_tokens < 1 or self.choose(num_tokens) == "chunked":
            return 0
        return min(num_tokens, self.max_tokens)

    def observe(self, path: Path, num_tokens: int, seconds: float) -> None:
        """What a chunk or a streamed pass took. A pass no longer than the bus needs says something
        about the bus, a longer one about computing.
        """
        if num_tokens < 1 or seconds <= 0:
            return
        if path == "chunked":
            self.chunked_token_s = _mix(self.chunked_token_s, seconds / num_tokens)
        elif seconds <= 1.1 * self.pass_s or num_tokens * self.streamed_token_s < self.pass_s:
            self.pass_s = _mix(self.pass_s, seconds)
        else:
            self.streamed_token_s = _mix(self.streamed_token_s, seconds / num_tokens)

    def describe(self) -> str:
        """One line for the start-up report."""
        if self.forced is not None:
            return f"prompts: always {self.forced}"
        crossing = next((n for n in _LENGTHS if self.choose(n) == "slp"), None)
        if crossing is None:
            return "prompts: in chunks, experts on the CPU"
        return (
            f"prompts: from about {crossing} tokens streamed, all experts in "
            f"{self.pass_s:.2f} s; shorter ones in chunks, about "
            f"{self.chunked_token_s * 1e3:.2f} ms a token"
        )


_LENGTHS = [2**i for i in range(18)]


def _mix(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
