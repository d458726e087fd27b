"""What a reliability check finds: goals with their figures, and how they are printed and kept."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Form = Literal["short", "ci", "release"]
FORMS: tuple[Form, ...] = ("short", "ci", "release")


@dataclasses.dataclass(frozen=True)
class Goal:
    """One figure beside the wanted one. passed: None where this machine cannot measure it; `got`
    says why then.
    """

    what: str
    wanted: str
    got: str
    passed: bool | None

    @property
    def mark(self) -> str:
        return {True: "ok", False: "FAILED", None: "not measured"}[self.passed]


@dataclasses.dataclass(frozen=True)
class Check:
    """A property to measure. sizes: how much of it in each form, in the unit of `measure`."""

    title: str
    sizes: Mapping[Form, float]
    unit: str
    measure: Callable[[int], Sequence[Goal]]

    def run(self, form: Form, size: int | None = None) -> Figure:
        count = int(self.sizes[form]) if size is None else size
        start = time.monotonic()
        try:
            goals = tuple(self.measure(count))
        except Exception as e:  # of the check or of the server: a figure that was not reached
            words = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            goals = (Goal("the check itself", "to end", words, False),)
        done = count if size is not None or form == "short" else self.sizes[form]
        said = f"{done:,} {self.unit}" if self.unit else ""
        return Figure(self.title, form, said, goals, round(time.monotonic() - start, 1))


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a check found. size: how much was done, in words."""

    title: str
    form: Form
    size: str
    goals: tuple[Goal, ...]
    seconds: float

    @property
    def failed(self) -> bool:
        return any(goal.passed is False for goal in self.goals)

    def describe(self, name: str) -> str:
        head = f"{name:4} {self.title}" + (f": {self.size}" if self.size else "")
        lines = [f"{head} ({self.seconds:.0f} s)"]
        for goal in self.goals:
            lines.append(f"     {goal.mark:12} {goal.what}: {goal.got}; wanted {goal.wanted}")
        return "\n".join(lines)


def as_json(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
    }


def from_json(value: Mapping[str, Any]) -> dict[str, Figure]:
    return {
        name: Figure(**{**f, "goals": tuple(Goal(**g) for g in f["goals"])})
        for name, f in value["figures"].items()
    }


def markdown(value: Mapping[str, Any]) -> str:
    """The table of the README."""
    lines = ["| | property | done | wanted | measured |", "|---|---|---|---|---|"]
    for name, figure in from_json(value).items():
        for at, goal in enumerate(figure.goals):
            first = (name, figure.title, figure.size) if not at else ("", "", "")
            got = goal.got if goal.passed else f"**{goal.mark}**: {goal.got}"
            what = f"{goal.what}: {goal.wanted}"
            lines.append("| " + " | ".join((*first, what, got)).replace("\n", " ") + " |")
    lines.append("")
    lines.append(f"(on {value['machine']})")
    return "\n".join(lines)


def machine() -> str:
    """The machine in words, without its name."""
    import os

    name = platform.machine()
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{len(os.sched_getaffinity(0))} CPUs of {name}, Linux {platform.release()}"


def percentile(values: Sequence[float], p: float) -> float:
    """The value that a share `p` of all is not above; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(p * len(ordered)), len(ordered) - 1)] if ordered else 0.0
