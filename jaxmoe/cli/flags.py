"""Command-line flags made from the dataclasses they fill, so that a default is stated once.

Precedence: defaults < the TOML file of --config < environment (JAXMOE_<FLAG>) < flags. An engine
option and a sampling parameter of one name (seed) are told apart by the prefix `engine_`. What it
does not do: start anything.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import Rule, nearest, rules
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.generation import RECOMMENDED
from jaxmoe.config.load import read_tables
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.server_config import API_KEYS_VARIABLE, ServerConfig

ENV_PREFIX = "JAXMOE_"
ENGINE, SAMPLING, SERVER = "engine", "sampling", "server"
_DATACLASSES = {SAMPLING: SamplingParams, ENGINE: EngineConfig, SERVER: ServerConfig}
TABLES = (ENGINE, SAMPLING)  # what most commands take
# Variables that are no flags: the tools' own, and what must not show in `ps`.
OTHER_VARIABLES = {"JAXMOE_CONFIG", API_KEYS_VARIABLE, "JAXMOE_VENV", "JAXMOE_FUZZ_EXAMPLES"}
_LISTS = {"stop", "stop_token_ids"}  # flags that may be given more than once


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of one dataclass, and the flag that sets it."""

    flag: str
    table: str
    field: str
    rule: Rule
    default: Any


@dataclasses.dataclass(frozen=True)
class Given:
    """What the person gave, by field name; everything else is the defaults' business."""

    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    server: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def options(tables: Sequence[str] = TABLES) -> list[Option]:
    """Every option of these tables that has a flag, in their order."""
    out = []
    for table in tables:
        defaults = {f.name: f.default for f in dataclasses.fields(_DATACLASSES[table])}
        for name, rule in rules(_DATACLASSES[table]).items():
            clash = table == ENGINE and SAMPLING in tables and name in rules(SamplingParams)
            flag = f"engine_{name}" if clash else name
            out.append(Option(flag, table, name, rule, defaults[name]))
    return out


def define(values: flags.FlagValues, tables: Sequence[str] = TABLES) -> None:
    """Defines --config and a flag for every option. Unset flags are None: defaults stay
    where they are.
    """
    flags.DEFINE_string("config", None, "TOML file with options by name", flag_values=values)
    for option in options(tables):
        text = help_text(option)
        if option.rule.kind == "bool":
            flags.DEFINE_boolean(option.flag, None, text, flag_values=values)
        elif option.field in _LISTS:
            flags.DEFINE_multi_string(option.flag, None, text, flag_values=values)
        else:
            flags.DEFINE_string(option.flag, None, text, flag_values=values)


def help_text(option: Option) -> str:
    rule, default = option.rule, option.default
    words = rule.help
    if rule.kind != "other" and not (rule.kind == "str" and not rule.choices):
        words += f"; {rule.wanted()}"
    if default is not None and default != ():
        shown = str(default).lower() if isinstance(default, bool) else default
        first = "default: the checkpoint's, else" if option.field in RECOMMENDED else "default"
        words += f" ({first} {shown})"
    return words


def collect(
    values: flags.FlagValues, environment: Mapping[str, str], tables: Sequence[str] = TABLES
) -> Given:
    """Merges the TOML file, the environment and the flags; the dataclasses check the values."""
    given: dict[str, dict[str, Any]] = {ENGINE: {}, SAMPLING: {}, SERVER: {}}
    config = values["config"].value or environment.get(ENV_PREFIX + "CONFIG")
    if config:
        # Reversed: an option that two tables know (seed) is the last one's at the file's top.
        given |= read_tables(config, {t: _DATACLASSES[t] for t in reversed(tables)})
    for option in options(tables):
        name = ENV_PREFIX + option.flag.upper()
        if name in environment:
            given[option.table][option.field] = parse(name, option, environment[name])
        value = values[option.flag].value
        if value is not None:
            given[option.table][option.field] = parse(f"--{option.flag}", option, value)
    return Given(given[ENGINE], given[SAMPLING], given[SERVER])


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """What to say of JAXMOE_ variables that no command knows: nothing would come of them."""
    known = {ENV_PREFIX + o.flag.upper() for o in options(tuple(_DATACLASSES))}
    # An option that two tables know has its plain name where there is only one of them.
    known |= {ENV_PREFIX + name.upper() for c in _DATACLASSES.values() for name in rules(c)}
    known |= OTHER_VARIABLES
    given = sorted(n for n in environment if n.startswith(ENV_PREFIX) and n not in known)
    return [f"{name} is no option of jaxmoe{nearest(name, known)}; it is ignored" for name in given]


def parse(name: str, option: Option, value: str | bool | list[str]) -> Any:
    """A flag's or variable's text as the field's type; range checks are the dataclass's."""
    rule = option.rule
    if rule.kind == "other":
        return _parse_collection(name, option.field, [value] if isinstance(value, str) else value)
    if isinstance(value, bool):
        return value
    assert isinstance(value, str)
    if rule.optional and value.lower() == "none":
        return None
    if rule.kind == "bool":
        words = {"true": True, "1": True, "false": False, "0": False}
        if value.lower() not in words:
            raise ConfigError(f"{name}: got {value!r}, wanted true or false")
        return words[value.lower()]
    if rule.kind in ("int", "float"):
        try:
            return int(value) if rule.kind == "int" else float(value)
        except ValueError:
            raise ConfigError(f"{name}: got {value!r}, wanted {rule.wanted()}") from None
    return value


def _parse_collection(name: str, field: str, texts: Any) -> Any:
    """stop: each text is one stop string; stop_token_ids: numbers, also several with commas
    between; logit_bias: `ID:BIAS` pairs with commas between.
    """
    if field == "stop":
        return tuple(texts)
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    try:
        if field == "stop_token_ids":
            return tuple(int(part) for part in parts)
        pairs = [part.split(":") for part in parts]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        form = "ID,ID" if field == "stop_token_ids" else "ID:BIAS,ID:BIAS"
        raise ConfigError(f"{name}: got {','.join(texts)!r}, wanted {form}") from None


def docs_table(tables: Sequence[str]) -> str:
    """The flags as a Markdown table."""
    lines = ["| flag | |", "|---|---|"]
    for option in options(tables):
        form = f"--[no]{option.flag}" if option.rule.kind == "bool" else f"--{option.flag}"
        lines.append(f"| `{form}` | {help_text(option)} |")
    return "\n".join(lines)


def parse_args(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses argv (program name first) and returns what is no flag; ConfigError instead of
    absl's own.
    """
    try:
        return values(list(argv))[1:]
    except flags.UnrecognizedFlagError as e:
        hint = nearest(e.flagname, list(values))
        raise ConfigError(f"unknown flag --{e.flagname}{hint}; see --help") from None
    except flags.Error as e:
        words = " ".join(str(e).split())
        words = re.sub(r"\('Non-boolean .*', (.*)\)", r"got \1, wanted true or false", words)
        raise ConfigError(f"{words}; see --help") from None


def usage(values: flags.FlagValues, doc: str, tables: Sequence[str] = TABLES) -> str:
    """The help text: the command's own words, its own flags, then the options in order, if the
    command takes them.
    """
    shared = [option.flag for option in options(tables)] if "config" in values else []
    own = sorted(name for name in set(values) - set(shared) if len(name) > 1)
    lines = [doc.rstrip(), "", *_flag_lines(values, own)]
    if shared:
        lines += [
            "",
            "Options, which may also be given as JAXMOE_<OPTION> or in the --config file:",
        ]
        lines += _flag_lines(values, shared)
    return "\n".join(lines)


def _flag_lines(values: flags.FlagValues, names: Sequence[str]) -> list[str]:
    lines = []
    for name in names:
        form = f"--[no]{name}" if values[name].boolean else f"--{name}=..."
        text = (values[name].help or "").split(";\n    repeat this option")[0]
        words = textwrap.wrap(text, 92)
        lines += [f"  {form}", *(f"      {line}" for line in words)]
    return lines
