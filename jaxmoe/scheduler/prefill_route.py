"""Which way a prompt is computed: in chunks with the experts on the CPU, or streamed, to one device
(slp) or to several that share the prompt and the experts (dslp).

Chunks cost CPU time by the token; a streamed pass costs at least the time all experts take over the
bus, whatever the prompt's length (paper sections 3.1 and 3.2). All rates begin as estimates and are
then what this machine was seen to do. Pure Python: seconds come in as numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

Path = Literal["chunked", "slp", "dslp"]

# Of a new observation: a few prompts correct a wrong estimate, one odd minute does not.
_WEIGHT = 0.3


class StreamedPass(NamedTuple):
    """The next pass of a prompt: the way it takes, and how many of its tokens."""

    path: Path
    tokens: int


@dataclasses.dataclass
class DslpRates:
    """As the route's own of one device: all experts over the buses of `num_devices` at once, a
    token on all of them together.
    """

    pass_s: float
    token_s: float
    max_tokens: int
    num_devices: int


@dataclasses.dataclass
class PrefillRoute:
    """Figures are seconds.

    pass_s: all experts over the bus once; infinite where no single device streams.
    streamed_token_s, chunked_token_s: computing a token on the device, and in chunks. max_tokens:
    of one streamed pass. forced: a path for all prompts. source: of the rates it began with, for
    the start-up report. dslp: of several devices at once, None without. free_devices: that a prompt
    may have now. copy_share: of the bus, what streaming may take now.
    """

    pass_s: float
    streamed_token_s: float
    chunked_token_s: float
    max_tokens: int
    forced: Path | None = None
    source: str = ""
    dslp: DslpRates | None = None
    free_devices: int = 1
    copy_share: float = 1.0

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
        pass_s, token_s, most = self._streamed(path)
        whole, rest = divmod(num_tokens, most)
        passes = [most] * whole + ([rest] if rest else [])
        return sum(max(pass_s / self.copy_share, n * token_s) for n in passes)

    def _streamed(self, path: Path) -> tuple[float, float, int]:
        """pass_s, token_s and max_tokens."""
        if path == "slp":
            return self.pass_s, self.streamed_token_s, self.max_tokens
        assert self.dslp is not None, "no devices for dslp"
        return self.dslp.pass_s, self.dslp.token_s, self.dslp.max_tokens

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those that may be taken now."""
        if self.dslp is None or self.dslp.num_devices > self.free_devices:
            return "chunked", "slp"
        return "chunked", "slp", "dslp"

    def choose(self, num_tokens: int) -> Path:
        """The way that is predicted to be fastest; of equals the first of `paths`."""
        if self.forced is not None:
            return self.forced
        return min(self.paths, key=lambda path: self.predict_s(path, num_tokens))

    def next_pass(self, num_tokens: int) -> StreamedPass | None:
        """The next streamed pass of a prompt with so many tokens left; None: use chunks."""
        path = self.choose(num_tokens) if num_tokens > 0 else "chunked"
        if path == "chunked":
            return None
        return StreamedPass(path, min(num_tokens, self._streamed(path)[2]))

    def observe(self, path: Path, num_tokens: int, seconds: float) -> None:
        """What a chunk or a streamed pass took. A pass no longer than the bus needs says something
        about the bus, a longer one about computing.
        """
        if num_tokens < 1 or seconds <= 0:
            return
        if path == "chunked":
            self.chunked_token_s = _mix(self.chunked_token_s, seconds / num_tokens)
            return
        pass_s, token_s, _ = self._streamed(path)
        if seconds <= 1.1 * pass_s or num_tokens * token_s < pass_s:
            pass_s = _mix(pass_s, seconds)
        else:
            token_s = _mix(token_s, seconds / num_tokens)
        if path == "slp":
            self.pass_s, self.streamed_token_s = pass_s, token_s
        elif self.dslp is not None:
            self.dslp.pass_s, self.dslp.token_s = pass_s, token_s

    def describe(self) -> str:
        """One line for the start-up report."""
        if self.forced is not None:
            return f"prompts: always {self.forced}"
        crossing = next((n for n in _LENGTHS if self.choose(n) != "chunked"), None)
        if crossing is None:
            return "prompts: in chunks, experts on the CPU"
        ways, before = [], None
        for length in _LENGTHS[_LENGTHS.index(crossing) :]:
            path = self.choose(length)
            if path not in ("chunked", before):
                seconds = self._streamed(path)[0]
                ways.append(
                    f"from about {length} tokens streamed ({path}), all experts in {seconds:.2f} s"
                )
            before = path
        return (
            f"prompts: {'; '.join(ways)}; shorter ones in chunks, about "
            f"{self.chunked_token_s * 1e3:.2f} ms a token"
        )


_LENGTHS = [2**i for i in range(18)]


def _mix(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
