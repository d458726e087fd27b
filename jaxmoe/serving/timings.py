"""How long an answer took, for the `timings` field (the names local users know from llama.cpp),
and how long its prompt will.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.request import CompletionOutput


def timings_object(completions: Iterable[CompletionOutput | None]) -> dict[str, Any]:
    """Of the slowest completion; speeds in tokens a second, times in milliseconds."""
    timings = [c.timings for c in completions if c is not None]
    if not timings:
        return {}
    t = max(timings, key=lambda t: t.ttft_s + t.tpot_s * t.output_tokens)
    prefill_s = max(t.ttft_s - t.queue_s, 1e-9)
    computed = t.prompt_tokens - t.cached_tokens
    decode_s = t.tpot_s * max(t.output_tokens - 1, 0)
    return {
        "cache_n": t.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": 1e3 * prefill_s,
        "prompt_per_second": computed / prefill_s,
        "predicted_n": t.output_tokens,
        "predicted_ms": 1e3 * decode_s,
        "predicted_per_second": 1 / t.tpot_s if t.tpot_s > 0 else 0.0,
        "queue_ms": 1e3 * t.queue_s,
        "ttft_ms": 1e3 * t.ttft_s,
    }


def prompt_progress(progress: PrefillProgress) -> dict[str, Any]:
    """Tokens, the layer of a streamed prompt, and the time left where it is known."""
    shown: dict[str, Any] = {
        "total": progress.prompt_tokens,
        "processed": progress.computed_tokens,
    }
    if progress.num_layers:
        shown |= {"layer": progress.layer, "layers": progress.num_layers}
    if progress.left_s > 0:
        shown["left_ms"] = 1e3 * progress.left_s
    return shown
