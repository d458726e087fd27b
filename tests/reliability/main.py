"""tools/reliability: measures the server's reliability figures against a real jaxmoe_serve.

    tools/reliability                          all of them, in the form for CI (an hour or more)
    tools/reliability --form=short             a minute or two
    tools/reliability --only=R3,R7 --json=FILE
    tools/reliability --only=R1 --size=5000    another amount than the form's

Each prints its figure beside the wanted one; the exit code is 1 when one fails, and 2 for a wrong
command line. R11 (coverage) and R14 (availability of a month) are not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reliability import (
    r01_fuzz,
    r02_soak,
    r03_cancel,
    r04_overload,
    r05_engine,
    r06_drain,
    r07_checkpoints,
    r08_slow,
    r09_memory,
    r10_native,
    r12_mixes,
    r13_hygiene,
)
from reliability.figures import FORMS, Check, Figure, as_json, from_json

CHECKS: dict[str, Check] = {
    "R1": r01_fuzz.CHECK,
    "R2": r02_soak.CHECK,
    "R3": r03_cancel.CHECK,
    "R4": r04_overload.CHECK,
    "R5": r05_engine.CHECK,
    "R6": r06_drain.CHECK,
    "R7": r07_checkpoints.CHECK,
    "R8": r08_slow.CHECK,
    "R9": r09_memory.CHECK,
    "R10": r10_native.CHECK,
    "R12": r12_mixes.CHECK,
    "R13": r13_hygiene.CHECK,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "tools/reliability", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, default="ci")
    parser.add_argument("--only", default=",".join(CHECKS), help="names with commas between")
    parser.add_argument("--size", type=int, help="how much of each, in the check's own unit")
    parser.add_argument(
        "--json", type=Path, help="file for the figures; what it has of other checks stays"
    )
    given = parser.parse_args(argv)
    names = [name.strip().upper() for name in given.only.split(",")]
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--only: got {', '.join(unknown)}, wanted some of {', '.join(CHECKS)}")
    if given.size is not None and given.size < 1:
        parser.error(f"--size: got {given.size}, wanted at least 1")
    figures: dict[str, Figure] = {}
    if given.json is not None and given.json.exists():
        figures = from_json(json.loads(given.json.read_text()))
    for name in names:
        figures[name] = CHECKS[name].run(given.form, given.size)
        print(figures[name].describe(name), flush=True)
        if given.json is not None:
            ordered = {n: figures[n] for n in CHECKS if n in figures}
            given.json.write_text(json.dumps(as_json(ordered), indent=1) + "\n")
    failed = [name for name in names if figures[name].failed]
    print(f"FAILED: {', '.join(failed)}" if failed else f"all of {', '.join(names)} hold")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
