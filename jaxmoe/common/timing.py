"""Wall-clock figures of a request, from three moments that the engine notes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Timings:
    """What one completion took.

    cached_tokens: prompt tokens that the prefix cache had, so that they were not computed.
    queue_s: from arrival to the first prefill step. ttft_s: from arrival to the first token.
    tpot_s: mean time per token after the first (0 when there is only one). tok_per_s: output tokens
    over the time since arrival.
    """

    prompt_tokens: int
    output_tokens: int
    queue_s: float
    ttft_s: float
    tpot_s: float
    tok_per_s: float
    cached_tokens: int = 0

    @classmethod
    def of(
        cls,
        *,
        prompt_tokens: int,
        output_tokens: int,
        arrival_s: float,
        started_s: float,
        first_token_s: float,
        finished_s: float,
        cached_tokens: int = 0,
    ) -> Timings:
        total_s = max(finished_s - arrival_s, 1e-9)
        later = output_tokens - 1
        return cls(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            queue_s=started_s - arrival_s,
            ttft_s=first_token_s - arrival_s,
            tpot_s=(finished_s - first_token_s) / later if later > 0 else 0.0,
            tok_per_s=output_tokens / total_s,
            cached_tokens=cached_tokens,
        )
