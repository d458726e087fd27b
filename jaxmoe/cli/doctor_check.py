"""One finding of jaxmoe_doctor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

Status = Literal["ok", "warn", "fail"]
OK: Status = "ok"
WARN: Status = "warn"
FAIL: Status = "fail"


@dataclasses.dataclass(frozen=True)
class Check:
    """found: the fact. meaning: what follows from it. action: what to do; empty for nothing."""

    name: str
    status: Status
    found: str
    meaning: str = ""
    action: str = ""

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that trips over an odd machine is itself a finding, and the others still run."""
    try:
        return check()
    except Exception as e:
        return Check(
            name,
            WARN,
            f"could not be checked: {type(e).__name__}: {e}",
            "This machine is unlike those the check was written for.",
            "Report it together with the output of jaxmoe_doctor --json.",
        )
