"""A load test as a picture: a sweep's curves, or the distributions of a single point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe.common.errors import ConfigError


def require() -> None:
    """Raises ConfigError where matplotlib is missing: before the load, not after it."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'jaxmoe[bench]', or "
            "leave --plot out"
        ) from None


def plot(
    path: Path, title: str, summaries: Sequence[dict[str, Any]], requests: Sequence[dict[str, Any]]
) -> None:
    """Writes a PNG. requests: the records of the only point, where there is one."""
    from matplotlib.backends.backend_agg import (  # pyright: ignore[reportMissingImports]
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    has_goodput = len(summaries) > 1 and summaries[0]["goodput_requests_per_s"] is not None
    panels = 4 if has_goodput else 3
    figure = Figure(figsize=(3.6 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    if len(summaries) > 1:
        _curves(axes, summaries)
    else:
        _distributions(axes, requests)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as e:
        raise ConfigError(f"--plot: {path}: {e.strerror}") from None


def _curves(axes: Any, summaries: Sequence[dict[str, Any]]) -> None:
    by_rate = len({s["request_rate"] for s in summaries}) > 1
    key, label = ("request_rate", "requests/s offered") if by_rate else ("concurrency", "in flight")
    shown = [s for s in summaries if s[key] is not None]
    x = [s[key] for s in shown]
    for ax, name, title in (
        (axes[0], "ttft_s", "time to first token, ms"),
        (axes[1], "tpot_s", "time per output token, ms"),
    ):
        for mark in ("p50", "p99"):
            y = [s[name][mark] * 1e3 if s[name] else float("nan") for s in shown]
            ax.plot(x, y, marker="o", label=mark)
        ax.set(title=title, xlabel=label)
        ax.legend(frameon=False)
    axes[2].plot(x, [s["output_tokens_per_s"] for s in shown], marker="o")
    axes[2].set(title="output tokens/s", xlabel=label)
    if len(axes) > 3:
        axes[3].plot(x, [s["goodput_requests_per_s"] for s in shown], marker="o")
        axes[3].set(title="goodput, requests/s", xlabel=label)
    for ax in axes:
        ax.set_ylim(0, ax.get_ylim()[1] * 1.1)


def _distributions(axes: Any, requests: Sequence[dict[str, Any]]) -> None:
    good = [r for r in requests if r["error"] is None]
    first = sorted(r["ttft_s"] * 1e3 for r in good)
    gaps = sorted(gap * 1e3 for r in good for gap in r["itl_s"])
    for ax, values, title in (
        (axes[0], first, "time to first token, ms"),
        (axes[1], gaps, "between tokens, ms"),
    ):
        share = [(i + 1) / len(values) for i in range(len(values))]
        ax.step(values, share, where="post")
        ax.set(title=title, ylabel="share of them", ylim=(0, 1.02))
    axes[2].scatter([r["due_s"] for r in good], [r["e2e_s"] for r in good], s=12)
    axes[2].set(title="whole request, s", xlabel="due after, s", ylim=(0, None))
