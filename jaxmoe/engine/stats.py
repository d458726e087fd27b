"""What an engine counts for /metrics: names as there, without their prefix.

Counters end in _total; histograms are given as Prometheus has them (cumulative `_bucket{le="..."}`,
`_sum`, `_count`); everything else is a gauge. All of it is numbers under fixed names, so that they
can lie in memory shared with another process. A restarted engine begins at zero, which readers of
counters know.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxmoe.common.timing import Timings
from jaxmoe.kv_cache.pages import PageAllocator
from jaxmoe.kv_cache.prefix import PrefixCache
from jaxmoe.request import FinishReason
from jaxmoe.scheduler.scheduler import Scheduler, StepPlan

# Up to the patience of a person with a long prompt, and up to a flagship on one slow socket.
TTFT_BUCKETS_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TPOT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")
_KINDS = ("prefill", "decode", "stream")
_UNDRAFTED = ("adjusted_logits", "grammar")  # of sequences whose next tokens are not guessed


class Stats:
    """Totals since the engine was made. Not thread-safe: the engine's thread fills and reads it."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = dict.fromkeys(
            (
                "prompt_tokens_total",
                "cached_prompt_tokens_total",
                "generation_tokens_total",
                "preemptions_total",
                *(f'requests_total{{finish_reason="{reason}"}}' for reason in _REASONS),
                *(f'steps_total{{kind="{kind}"}}' for kind in _KINDS),
                *(f'step_seconds_total{{kind="{kind}"}}' for kind in _KINDS),
                *(f'step_tokens_total{{kind="{kind}"}}' for kind in _KINDS),
                "compiled_steps_total",
                "draft_tokens_total",
                "draft_tokens_accepted_total",
                *(f'undrafted_tokens_total{{reason="{reason}"}}' for reason in _UNDRAFTED),
                "draft_tokens_per_step",
                "draft_acceptance_rate",
                "weight_bytes_read_total",
                "kv_bytes_read_total",
                "decode_bytes_read_total",
                "last_decode_step_seconds",
                "last_decode_step_weight_bytes",
                "last_decode_step_kv_bytes",
                "longest_step_seconds",
                "longest_step_with_compiling_seconds",
            ),
            0.0,
        )
        self._ttft = _Histogram("time_to_first_token_seconds", TTFT_BUCKETS_S)
        self._tpot = _Histogram("time_per_output_token_seconds", TPOT_BUCKETS_S)
        self._read_before = (0.0, 0.0)
        self._longest_s = 0.0
        self.read_ceiling = 0.0  # bytes per second (read_ceiling.py); 0: not measured

    @property
    def longest_step_s(self) -> float:
        """Of all steps, those that compiled too: what the watchdog's patience goes by. The first
        step of a shape is the one that compiles, and says how long the next may take.
        """
        return self._longest_s

    def note_step(
        self, plan: StepPlan, seconds: float, counters: Mapping[str, int], *, compiled: bool
    ) -> None:
        """counters: of the native runtime, since it was made."""
        t, kind = self._totals, plan.kind
        t[f'steps_total{{kind="{kind}"}}'] += 1
        t[f'step_seconds_total{{kind="{kind}"}}'] += seconds
        t[f'step_tokens_total{{kind="{kind}"}}'] += plan.num_tokens
        self._longest_s = max(self._longest_s, seconds)
        t["longest_step_with_compiling_seconds"] = self._longest_s
        t["compiled_steps_total"] += compiled
        if not compiled:
            t["longest_step_seconds"] = max(t["longest_step_seconds"], seconds)
        weights = counters.get("experts_weight_bytes", 0) + counters.get("linear_weight_bytes", 0)
        read = float(weights), float(counters.get("attention_kv_bytes", 0))
        if kind == "decode":
            t["last_decode_step_seconds"] = seconds
            t["last_decode_step_weight_bytes"] = read[0] - self._read_before[0]
            t["last_decode_step_kv_bytes"] = read[1] - self._read_before[1]
            t["decode_bytes_read_total"] += sum(read) - sum(self._read_before)
        t["weight_bytes_read_total"], t["kv_bytes_read_total"] = self._read_before = read

    def note_layer(self, seconds: float) -> None:
        """One layer of a streamed prompt; its step is noted when all are done."""
        self._totals['step_seconds_total{kind="stream"}'] += seconds
        self._longest_s = max(self._longest_s, seconds)

    def note_guesses(self, verified: int, right: int, why_not: str) -> None:
        """Of one sequence in a decode; why_not: the reason where its tokens are not guessed."""
        self._totals["draft_tokens_total"] += verified
        self._totals["draft_tokens_accepted_total"] += right
        if why_not:
            self._totals[f'undrafted_tokens_total{{reason="{why_not}"}}'] += 1

    def note_draft_policy(self, num_guesses: int, rate: float) -> None:
        """What is guessed at present, and how many of 1 are right (scheduler/draft_policy.py)."""
        self._totals["draft_tokens_per_step"] = num_guesses
        self._totals["draft_acceptance_rate"] = rate

    def note_first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def note_tokens(self, count: int) -> None:
        self._totals["generation_tokens_total"] += count

    def note_finished(self, timings: Timings, reason: FinishReason, preemptions: int) -> None:
        """One completion ended."""
        t = self._totals
        t[f'requests_total{{finish_reason="{reason}"}}'] += 1
        t["prompt_tokens_total"] += timings.prompt_tokens
        t["cached_prompt_tokens_total"] += timings.cached_tokens
        t["preemptions_total"] += preemptions
        if timings.output_tokens > 1:
            self._tpot.observe(timings.tpot_s)

    def snapshot(
        self, scheduler: Scheduler, pages: PageAllocator, prefix: PrefixCache | None
    ) -> dict[str, float]:
        """Everything by name, always in the same order."""
        waiting = scheduler.waiting
        ceiling, t = self.read_ceiling, self._totals
        seconds = t["last_decode_step_seconds"]
        read = t["last_decode_step_weight_bytes"] + t["last_decode_step_kv_bytes"]
        return {
            "requests_running": float(len(scheduler.running)),
            "requests_waiting": float(len(waiting)),
            "waiting_prompt_tokens": float(sum(s.num_prompt for s in waiting)),
            "kv_pages": float(pages.num_pages),
            "kv_pages_used": float(pages.num_pages - pages.num_free),
            "kv_pages_free": float(pages.num_free),
            "kv_pages_cached": float(pages.num_idle),
            "prefix_cache_query_tokens_total": float(prefix.queried_tokens if prefix else 0),
            "prefix_cache_hit_tokens_total": float(prefix.hit_tokens if prefix else 0),
            "prefix_cache_evictions_total": float(prefix.num_evictions if prefix else 0),
            "read_ceiling_bytes_per_second": ceiling,
            # Of the last decode step. Models that fit into the caches come out above 1.
            "dram_fraction_of_ceiling": read / seconds / ceiling if ceiling and seconds else 0.0,
            **self._totals,
            **self._ttft.snapshot(),
            **self._tpot.snapshot(),
        }


class _Histogram:
    def __init__(self, name: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        at = next((i for i, bound in enumerate(self._bounds) if value <= bound), -1)
        self._counts[at] += 1
        self._sum += value

    def snapshot(self) -> dict[str, float]:
        out, total = {}, 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            out[f'{self._name}_bucket{{le="{bound}"}}'] = float(total)
        return out | {f"{self._name}_sum": self._sum, f"{self._name}_count": float(total)}
