"""What a load test found: figures of one point of a sweep, as a table and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.cli.bench_client import Timed
from jaxmoe.cli.bench_load import Point

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
_NAMES = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "itl_s": "between tokens",
    "e2e_s": "whole request",
}


@dataclasses.dataclass(frozen=True)
class Slo:
    """What a request must keep to count as good; None is not asked."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def is_asked(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def is_met(self, timed: Timed) -> bool:
        if timed.error or (self.ttft_s is not None and timed.ttft_s > self.ttft_s):
            return False
        tpot = timed.tpot_s
        return self.tpot_s is None or tpot is None or tpot <= self.tpot_s


def summarize(point: Point, results: Sequence[Timed], seconds: float, slo: Slo) -> dict[str, Any]:
    """The figures of a point, ready for JSON. Latencies are of requests without an error."""
    good = [t for t in results if not t.error]
    errors = collections.Counter(t.error for t in results if t.error)
    output_tokens = sum(t.output_tokens for t in good)
    prompt_tokens = [t.prompt_tokens for t in good if t.prompt_tokens is not None]
    samples = {
        "ttft_s": [t.ttft_s for t in good],
        "tpot_s": [t.tpot_s for t in good if t.tpot_s is not None],
        "itl_s": [gap for t in good for gap in t.itl_s],
        "e2e_s": [t.end_s - t.due_s for t in good],
    }
    return {
        "request_rate": None if math.isinf(point.rate) else point.rate,
        "concurrency": point.concurrency,
        "load": point.describe(),
        "requests": len(results),
        "errors": len(results) - len(good),
        "error_messages": dict(errors.most_common(10)),
        "seconds": seconds,
        "prompt_tokens": sum(prompt_tokens) if len(prompt_tokens) == len(good) else None,
        "output_tokens": output_tokens,
        "token_counts": "usage" if all(t.counted for t in good) else "pieces of the stream",
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "prompt_tokens_per_s": sum(prompt_tokens) / seconds if prompt_tokens else None,
        "goodput_requests_per_s": (
            sum(map(slo.is_met, results)) / seconds if slo.is_asked else None
        ),
        **{name: distribution(values) for name, values in samples.items()},
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, extremes and percentiles (linear between samples); None without a sample."""
    if not values:
        return None
    marks = np.percentile(np.asarray(values, np.float64), PERCENTILES)
    return {
        "mean": float(np.mean(values)),
        "min": min(values),
        **{f"p{p}": float(mark) for p, mark in zip(PERCENTILES, marks, strict=True)},
        "max": max(values),
        "count": len(values),
    }


def records(results: Sequence[Timed]) -> list[dict[str, Any]]:
    """Every request on its own, for whoever wants other figures; times from the first due one."""
    zero = min((t.due_s for t in results), default=0.0)
    return [
        {
            "due_s": t.due_s - zero,
            "ttft_s": t.ttft_s if t.chunk_s else None,
            "e2e_s": t.end_s - t.due_s,
            "prompt_tokens": t.prompt_tokens,
            "output_tokens": t.output_tokens,
            "itl_s": t.itl_s,
            "finish_reason": t.finish_reason,
            "error": t.error or None,
        }
        for t in results
    ]


def describe(summary: dict[str, Any], slo: Slo) -> str:
    """A point for people."""
    s = summary
    lines = [
        f"{s['load']}: {s['requests'] - s['errors']} requests in {s['seconds']:.2f} s, "
        f"{s['errors']} errors",
        f"  {s['requests_per_s']:.3f} requests/s, {s['output_tokens_per_s']:.1f} output tokens/s"
        + (
            ""
            if s["prompt_tokens_per_s"] is None
            else f", {s['prompt_tokens_per_s']:.1f} prompt tokens/s"
        )
        + ("" if s["token_counts"] == "usage" else f" (tokens are {s['token_counts']})"),
    ]
    if slo.is_asked:
        asked = [
            f"{word} <= {value * 1e3:g} ms"
            for word, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
            if value is not None
        ]
        lines.append(
            f"  goodput {s['goodput_requests_per_s']:.3f} requests/s at {', '.join(asked)}"
        )
    columns = ("mean", *(f"p{p}" for p in PERCENTILES), "max")
    lines.append(f"  {'ms':22}" + "".join(f"{c:>10}" for c in columns))
    for name in LATENCIES:
        if s[name] is not None:
            figures = "".join(f"{s[name][c] * 1e3:10.2f}" for c in columns)
            lines.append(f"  {_NAMES[name]:22}{figures}")
    lines += [f"  error, {n} times: {message}" for message, n in s["error_messages"].items()]
    return "\n".join(lines)
