"""Options from a TOML file: the layer between the defaults and the command line.

The file holds options by name, at the top level or in tables such as [engine], [sampling]. Unknown
names are refused, so that a misspelt option is not silently the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import nearest, rules
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.sampling_params import SamplingParams


def read_toml(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine options and sampling parameters that a file gives; values are checked by their
    dataclasses.
    """
    # `seed` is both an engine option and a sampling parameter: at the top it is the request's.
    out = read_tables(path, {"sampling": SamplingParams, "engine": EngineConfig})
    return out["engine"], out["sampling"]


def read_tables(path: str | Path, tables: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Options by table. tables: the dataclasses whose fields they are; an option at the top level
    is of the first that knows it.
    """
    path = Path(path)
    try:
        with path.open("rb") as f:
            data = tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file {path}: not valid TOML: {e}") from None
    out: dict[str, dict[str, Any]] = {name: {} for name in tables}
    for name, value in data.items():
        if name in tables:
            if not isinstance(value, dict):
                raise ConfigError(f"config file {path}: {name!r} is {value!r}, wanted a table")
            for option, given in value.items():
                _put(path, out, option, given, {name: tables[name]})
        else:
            _put(path, out, name, value, tables)
    return out


def _put(
    path: Path,
    out: dict[str, dict[str, Any]],
    option: str,
    value: Any,
    tables: Mapping[str, type],
) -> None:
    for table, fields in tables.items():
        if option in rules(fields):
            out[table][option] = value
            return
    known = [name for fields in tables.values() for name in rules(fields)]
    raise ConfigError(
        f"config file {path}: unknown option {option!r}{nearest(option, known)}; known: "
        + ", ".join(known)
    )
