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
    source: of the rates it began with, for the start-up report.
    """

    pass_s: float
    streamed_token_s: float
    chunked_token_s: float
    max_tokens: int
    forced: Path | None = None
    source: str = ""

    @classmethod
    def estimated(
        cls,
        *,
        pass_bytes: float,
        copy_bytes_per_s: float,
        token_flops: float,
        device_flops_per_s: float,
        chunk_tokens: int,
        chunk_bytes: float,
        host_flops_per_s: float,
        host_bytes_per_s: float,
        max_tokens: int,
        forced: Path | None = None,
        source: str = "",
    ) -> PrefillRoute:
        """From what a machine moves and computes a second (engine/machine_rates.py).

        pass_bytes: that one streamed pass copies. token_flops: of a token's routed experts in all
        layers. chunk_tokens, chunk_bytes: of a step in chunks, and what it reads of the experts'
        weights. host_bytes_per_s: of the kernels that read them.
        """
        compute_s = token_flops / host_flops_per_s
        read_s = chunk_bytes / host_bytes_per_s / chunk_tokens
        return cls(
            pass_s=pass_bytes / copy_bytes_per_s,
            # Everything else of a token is about as much again.
            streamed_token_s=2 * token_flops / device_flops_per_s,
            chunked_token_s=max(compute_s, read_s),
            max_tokens=max_tokens,
            forced=forced,
            source=source,
        )

    def predict_s(self, path: Path, num_tokens: int) -> float:
        """What `num_tokens` take one way."""
        if path == "chunked":
            return num_tokens * self.chunked_token_s
        whole, rest = divmod(num_tokens, self.max_tokens)
        passes = [self.max_tokens] * whole + ([rest] if rest else [])
        return sum(max(self.pass_s, n * self.streamed_token_s) for n in passes)

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
