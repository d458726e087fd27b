"""Whether a model fits into memory, and what to change where it does not: numbers in, words out.

What it does not do: find the numbers (plan.py) or ask the machine (weights/memory.py). Pure Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxmoe.engine.gpu_plan import GpuPlan
from jaxmoe.weights.memory import Room, gib

When = Literal["always", "loading", "running"]


@dataclasses.dataclass(frozen=True)
class Item:
    """Memory for one purpose. when: "loading" is given back before "running" begins."""

    name: str
    nbytes: int
    note: str = ""
    when: When = "always"


@dataclasses.dataclass(frozen=True)
class Change:
    """An option that needs less. peak_bytes: the whole need with it; cost: what it costs."""

    flag: str
    peak_bytes: int
    cost: str


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a start with these options takes at its peak, and what there is.

    reclaimable_bytes: page cache beside it (experts mapped from files), which the kernel drops when
    memory runs short; not part of the peak. gpu: of its memory, where there is or would be one.
    """

    model: str
    items: tuple[Item, ...]
    rooms: tuple[Room, ...]
    changes: tuple[Change, ...] = ()
    reclaimable_bytes: int = 0
    notes: tuple[str, ...] = ()
    gpu: GpuPlan | None = None

    @property
    def peak_bytes(self) -> int:
        return peak_bytes(self.items)

    @property
    def room(self) -> Room:
        """The tightest bound."""
        return min(self.rooms, key=lambda room: room.free_bytes)

    @property
    def short_bytes(self) -> int:
        """How much is missing; 0 or less where it fits."""
        return self.peak_bytes - self.room.free_bytes

    @property
    def fits(self) -> bool:
        return self.short_bytes <= 0 and (self.gpu is None or self.gpu.fits)

    def describe(self) -> str:
        """For people: the items, the peak, the verdict and what to change."""
        lines = [f"model      {self.model}"]
        for item in self.items:
            when = "" if item.when == "always" else f" (while {item.when})"
            note = f", {item.note}" if item.note else ""
            lines.append(f"  {gib(item.nbytes):>10}  {item.name}{when}{note}")
        lines.append(f"  {gib(self.peak_bytes):>10}  at the peak")
        if self.reclaimable_bytes:
            lines.append(
                f"  {gib(self.reclaimable_bytes):>10}  beside it, page cache of the experts' "
                "files, which is dropped when memory runs short"
            )
        for room in sorted(self.rooms, key=lambda room: room.free_bytes):
            lines.append(f"available  {gib(room.free_bytes)}: {room.source}")
        lines += [f"note       {note}" for note in self.notes]
        lines += [] if self.gpu is None else self.gpu.describe()
        if self.short_bytes <= 0 and not self.fits:
            return "\n".join(lines)
        if self.fits:
            lines.append(f"FITS: {gib(-self.short_bytes)} to spare.")
            return "\n".join(lines)
        lines.append(
            f"DOES NOT FIT: needs {gib(self.peak_bytes)}, {gib(self.room.free_bytes)} available "
            f"({self.room.source}); short by {gib(self.short_bytes)}."
        )
        return "\n".join(lines + self._advice())

    def _advice(self) -> list[str]:
        enough = [c for c in self.changes if c.peak_bytes <= self.room.free_bytes]
        some = [c for c in self.changes if self.room.free_bytes < c.peak_bytes < self.peak_bytes]
        out = [f"  use {c.flag}: then {gib(c.peak_bytes)}; {c.cost}" for c in enough]
        if not enough:
            out += [f"  not enough alone: {c.flag}, {gib(c.peak_bytes)}; {c.cost}" for c in some]
        others = [room for room in self.rooms if room is not self.room]
        if others and min(room.free_bytes for room in others) >= self.peak_bytes:
            out.append(f"  raise the limit by {gib(self.short_bytes)}: {self.room.source}")
        else:
            out.append(f"  free {gib(self.short_bytes)} more, or use a smaller checkpoint")
        return out


def peak_bytes(items: Sequence[Item]) -> int:
    """What is always there, and the larger of what loading and what running adds."""
    total = {when: 0 for when in ("always", "loading", "running")}
    for item in items:
        total[item.when] += item.nbytes
    return total["always"] + max(total["loading"], total["running"])
