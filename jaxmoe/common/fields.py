"""Dataclass fields that check themselves: type, both bounds, choices and the help text in one
place.

A field's rule lives in its metadata, so that the constructor's check, the command-line flag made
from the field and any table of options all read the same words. What it does not do: check how
fields depend on each other.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any, Literal

from jaxmoe.common.errors import JaxMoeError

Kind = Literal["int", "float", "bool", "str", "other"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field accepts. `low` and `high` are inclusive unless `low_open`."""

    kind: Kind
    help: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()

    def wanted(self) -> str:
        """The rule in words, for error messages and flag help."""
        if self.kind in ("int", "float"):
            noun = "a whole number" if self.kind == "int" else "a finite number"
            words = f"{noun} {'above' if self.low_open else 'from'} {self.low} to {self.high}"
        elif self.kind == "bool":
            words = "true or false"
        elif self.choices:
            words = "one of " + ", ".join(self.choices)
        else:
            words = "text"
        return words + (" or none" if self.optional else "")


def checked(default: Any, kind: Kind, help: str, **rule: Any) -> Any:
    """A dataclass field with a `Rule`; keywords are those of `Rule`."""
    metadata = {"rule": Rule(kind=kind, help=help, **rule)}
    return dataclasses.field(default=default, metadata=metadata)


def rules(cls: type) -> dict[str, Rule]:
    """Every checked field of a dataclass, in order of declaration."""
    return {f.name: f.metadata["rule"] for f in dataclasses.fields(cls) if "rule" in f.metadata}


def check_fields(instance: Any, error: type[JaxMoeError]) -> None:
    """Checks and normalises all checked fields of a frozen dataclass; call it from
    `__post_init__`.
    """
    for name, rule in rules(type(instance)).items():
        if rule.kind != "other":
            value = check_value(name, getattr(instance, name), rule, error)
            object.__setattr__(instance, name, value)


def check_value(name: str, value: Any, rule: Rule, error: type[JaxMoeError]) -> Any:
    """Returns `value` as the plain Python type the rule wants, or raises `error` naming the
    field.
    """
    if value is None and rule.optional:
        return None
    if rule.kind in ("int", "float"):
        number = _as_number(value, rule.kind)
        if number is not None and _within(number, rule):
            return number
    elif rule.kind == "bool":
        if isinstance(value, bool):
            return value
    elif isinstance(value, str) and (not rule.choices or value in rule.choices):
        return value
    raise error(f"{name}: got {shown(value)}, wanted {rule.wanted()}")


def _as_number(value: Any, kind: Kind) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        if kind == "int":
            return int(value)
        try:
            return float(value)
        except OverflowError:
            return None
    if kind == "float" and isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def _within(number: int | float, rule: Rule) -> bool:
    if rule.low is not None and (number < rule.low or (rule.low_open and number == rule.low)):
        return False
    return rule.high is None or number <= rule.high


def shown(value: Any) -> str:
    """`value` for an error message: its repr, cut short."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"a number of about {int(value).bit_length() * 3 // 10} digits"
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a misspelt name, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
