"""Options from a TOML file: the layer between the defaults and the command line.

The file holds options by name, at the top level or in the tables [engine] and [sampling]. Unknown
names are refused, so that a misspelt option is not silently the default.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import nearest, rules
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.sampling_params import SamplingParams

TABLES = {"engine": EngineConfig, "sampling": SamplingParams}


def read_toml(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine options and sampling parameters that a file gives; values are checked by their
    dataclasses.
    """
    path = Path(path)
    try:
        with path.open("rb") as f:
            data = tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file {path}: not valid TOML: {e}") from None
    out: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
    for name, value in data.items():
        if name in TABLES:
            if not isinstance(value, dict):
                raise ConfigError(f"config file {path}: {name!r} is {value!r}, wanted a table")
            for option, given in value.items():
                _put(path, out, option, given, (name,))
        else:
            # `seed` is both an engine option and a sampling parameter: at the top it is the
            # request's.
            _put(path, out, name, value, ("sampling", "engine"))
    return out["engine"], out["sampling"]


def _put(
    path: Path, out: dict[str, dict[str, Any]], option: str, value: Any, tables: tuple[str, ...]
) -> None:
    for table in tables:
        if option in rules(TABLES[table]):
            out[table][option] = value
            return
    known = [name for table in tables for name in rules(TABLES[table])]
    raise ConfigError(
        f"config file {path}: unknown option {option!r}{nearest(option, known)}; known: "
        + ", ".join(known)
    )
