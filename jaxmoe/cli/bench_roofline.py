"""Figures as a roofline: arithmetic against bytes, under what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.common.errors import ConfigError


def plot(path: Path, title: str, figures: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG: one panel a number of threads, its roofs the medians of all their samples."""
    from matplotlib.backends.backend_agg import (  # pyright: ignore[reportMissingImports]
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    shown = [f for f in figures if f["bytes"] > 0 and f["flops"] > 0]
    threads = sorted({f["threads"] for f in shown})
    canvas = Figure(figsize=(7.2 * max(1, len(threads)), 5.2), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1, max(1, len(threads)), squeeze=False)[0]
    for ax, count in zip(axes, threads, strict=False):
        _panel(ax, [f for f in shown if f["threads"] == count])
        ax.set_title(f"{count} thread{'s' if count > 1 else ''}", fontsize=10)
    canvas.suptitle(title, fontsize=11)
    try:
        canvas.savefig(path, dpi=150, format="png")
    except OSError as e:
        raise ConfigError(f"--plot: {path}: {e.strerror}") from None


def _panel(ax: Any, figures: Sequence[Mapping[str, Any]]) -> None:
    ceiling = float(np.median([s for f in figures for s in f["read_ceiling_samples"]]))
    peak = float(np.median([f["peak_flops_per_s"] for f in figures]))
    intensity = [f["flops"] / f["bytes"] for f in figures]
    ridge = peak / ceiling
    x = np.geomspace(min(*intensity, ridge, 1.0) / 2, max(*intensity, ridge) * 2, 200)
    ax.plot(x, np.minimum(x * ceiling, peak) / 1e9, color="black", lw=1.2)
    ax.annotate(
        f"read ceiling {ceiling / 1e9:.1f} GB/s",
        (x[8], x[8] * ceiling / 1e9),
        textcoords="offset points",
        xytext=(0, 10),
        fontsize=8,
    )
    ax.annotate(
        f"{figures[0]['peak']} {peak / 1e9:.0f} GFLOP/s",
        (x[-1], peak / 1e9),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        fontsize=8,
    )
    for i, (at, f) in enumerate(zip(intensity, figures, strict=True)):
        words = f"{f['name']}: {f['fraction_of_roofline']:.2f}"
        mark = "osD^v<>ph*"[i // 10 % 10]  # ten colours, then the next mark
        ax.plot([at], [f["flops_per_s"] / 1e9], mark, ms=5, label=words)
    ax.legend(fontsize=6, loc="lower right", frameon=False, title="part of the roofline reached")
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte read", ylabel="GFLOP/s")
    ax.grid(alpha=0.3, which="both")
    ax.spines[["top", "right"]].set_visible(False)
