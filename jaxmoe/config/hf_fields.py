"""Typed, validated reading of a config.json, with errors that name key, value and what is
supported.

Every key read is remembered, so that a family's parser can report what it did not look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import shown

_REQUIRED: Any = object()
_LARGEST = 2**63 - 1  # JSON's integers have no end, but floats and arrays do


class HfFields:
    """The keys of one JSON object.

    A key given as null counts as absent, as it does in Hugging Face's own classes. Readers take the
    names a key has had over the years; the first one present wins.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def raw(self, *names: str, default: Any = _REQUIRED) -> Any:
        self._read.update(names)
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        if default is _REQUIRED:
            raise ConfigError(f"{self._where} lacks '{' or '.join(names)}'")
        return default

    def _present(self, names: tuple[str, ...]) -> str:
        """The name a value was found under; the first one where it is a default."""
        return next((name for name in names if self._values.get(name) is not None), names[0])

    def given(self, name: str) -> bool:
        self._read.add(name)
        return self._values.get(name) is not None

    def fail(self, name: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"{self._where}: '{name}' is {shown(value)}; supported: {wanted}")

    def integer(self, *names: str, default: Any = _REQUIRED, minimum: int = 1) -> Any:
        value = self.raw(*names, default=default)
        if value is default and default is not _REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(self._present(names), value, f"an integer of at least {minimum}")
        if value > _LARGEST:
            raise self.fail(self._present(names), value, "an integer of at most 2**63 - 1")
        return value

    def number(
        self,
        *names: str,
        default: Any = _REQUIRED,
        above: float = 0.0,
        at_least: float | None = None,
    ) -> Any:
        """A finite number; the bound `above` is not included, `at_least` replaces it and is."""
        value = self.raw(*names, default=default)
        if value is default and default is not _REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(self._present(names), value, "a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        is_low = value <= above if at_least is None else value < at_least
        if not math.isfinite(value) or is_low:
            bound = f"above {above:g}" if at_least is None else f"of at least {at_least:g}"
            raise self.fail(self._present(names), value, f"a finite number {bound}")
        return value

    def boolean(self, *names: str, default: Any = _REQUIRED) -> bool:
        value = self.raw(*names, default=default)
        if not isinstance(value, bool):
            raise self.fail(self._present(names), value, "true or false")
        return value

    def choice(self, *names: str, of: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """One of a few values; also how a feature that is not implemented is refused by name."""
        value = self.raw(*names, default=default)
        # 1 == True in Python, and neither is meant where the other is written
        if not any(type(value) is type(v) and value == v for v in of):
            raise self.fail(self._present(names), value, ", ".join(repr(v) for v in of))
        return value

    def integers(self, *names: str, default: Any = _REQUIRED, minimum: int = 0) -> tuple[int, ...]:
        value = self.raw(*names, default=default)
        items = value if isinstance(value, (list, tuple)) else None
        if items is None or any(
            isinstance(item, bool) or not isinstance(item, int) or item < minimum for item in items
        ):
            raise self.fail(
                self._present(names), value, f"a list of integers of at least {minimum}"
            )
        return tuple(items)

    def strings(self, *names: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        value = self.raw(*names, default=default)
        if not isinstance(value, (list, tuple)) or any(not isinstance(item, str) for item in value):
            raise self.fail(self._present(names), value, "a list of strings")
        return tuple(value)

    def table(self, *names: str) -> HfFields | None:
        """A nested object, None where it is absent or empty."""
        value = self.raw(*names, default=None)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(self._present(names), value, "an object")
        return HfFields(value, f"{self._where}, {self._present(names)}")

    def without(self, *names: str) -> HfFields:
        """The same object without some keys, which somebody else reads."""
        rest = {key: value for key, value in self._values.items() if key not in names}
        return HfFields(rest, self._where)

    def ignore(self, *names: str) -> None:
        """Keys known not to change what the model computes."""
        self._read.update(names)

    def unread(self) -> tuple[str, ...]:
        """Keys nobody looked at, without those that say nothing (null, false, empty)."""
        return tuple(
            key
            for key, value in self._values.items()
            if key not in self._read and value not in (None, False, [], {}, "")
        )

    @property
    def values(self) -> Mapping[str, Any]:
        return self._values

    @property
    def where(self) -> str:
        return self._where
