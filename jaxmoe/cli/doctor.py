"""jaxmoe_doctor: looks at this machine and says what jaxmoe will make of it.

    jaxmoe_doctor              what was found, what it means, what to do about it
    jaxmoe_doctor --json       the same for programs
    jaxmoe_doctor --bandwidth  also measures what the CPUs read from memory, the bound of decoding
    jaxmoe_doctor --remove_unused_weights
                               removes experts in shared memory that no process uses, and no more

The exit code is 1 if something must be changed before jaxmoe can run, else 0.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxmoe.cli import command, doctor_machine, doctor_software
from jaxmoe.cli import flags as option_flags
from jaxmoe.cli.doctor_check import FAIL, Check, guarded
from jaxmoe.config.engine_config import EngineConfig

_WIDTH = 96


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_boolean("json", False, "one JSON object on stdout", flag_values=values)
    flags.DEFINE_boolean("bandwidth", False, "measure memory bandwidth too", flag_values=values)
    flags.DEFINE_boolean(
        "remove_unused_weights",
        False,
        "remove this user's experts in shared memory (/dev/shm) that no process uses; no checks",
        flag_values=values,
    )
    flags.DEFINE_string(
        "cache_dir",
        EngineConfig().cache_dir,
        "where compiled programs are to be kept",
        flag_values=values,
    )
    command.define_help(values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: 0, or 1 if a check failed (or the command line is wrong)."""
    values = define_flags()
    return command.run(
        "jaxmoe_doctor",
        values,
        lambda rest: _run(values, rest),
        lambda: option_flags.usage(values, __doc__ or ""),
        argv,
    )


def _run(values: flags.FlagValues, rest: list[str]) -> int:
    command.no_arguments(rest, "--json, --bandwidth, --remove_unused_weights or --cache_dir=DIR")
    if values["remove_unused_weights"].value:
        print("\n".join(doctor_machine.remove_unused_weights()))
        return 0
    cache_dir: Any = values["cache_dir"].value
    checks = all_checks(cache_dir or "", bandwidth=bool(values["bandwidth"].value))
    failed = any(check.status == FAIL for check in checks)
    if values["json"].value:
        print(json.dumps({"ok": not failed, "checks": [c.as_dict() for c in checks]}, indent=2))
    else:
        print("\n".join(describe(check) for check in checks))
    return 1 if failed else 0


def all_checks(cache_dir: str, *, bandwidth: bool) -> list[Check]:
    """Every check, those of the machine after those of the software."""
    kinds = [
        ("Python", doctor_software.python),
        ("jax", doctor_software.packages),
        ("extension", doctor_software.extension),
        ("CPU", doctor_software.instruction_set),
        ("AMX", doctor_software.amx),
        ("self-test", doctor_software.self_test),
        ("cores", doctor_machine.cores),
        ("NUMA", doctor_machine.numa),
        ("huge pages", doctor_machine.huge_pages),
        ("memory", doctor_machine.memory),
        ("overcommit", doctor_machine.overcommit),
        ("shared memory", doctor_machine.shared_memory),
        ("shared weights", doctor_machine.shared_weights),
        ("limits", doctor_machine.limits),
        ("disk", lambda: doctor_machine.disk(cache_dir)),
        ("GPU", doctor_software.gpu),
    ]
    if bandwidth:
        kinds.append(("bandwidth", doctor_software.bandwidth))
    return [guarded(name, check) for name, check in kinds]


def describe(check: Check) -> str:
    """A check for people: status, what was found, and below it what it means and what to do."""
    indent = " " * 21
    lines = textwrap.wrap(
        check.found,
        _WIDTH,
        initial_indent=f"{check.status:5} {check.name:14} ",
        subsequent_indent=indent,
    )
    for word, text in (("", check.meaning), ("do: ", check.action)):
        if text:
            lines += textwrap.wrap(
                word + text, _WIDTH, initial_indent=indent, subsequent_indent=indent
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
