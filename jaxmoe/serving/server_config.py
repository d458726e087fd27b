"""How the server listens and what it allows: every option with its default and bounds, once.

Flags, the TOML table [server] and the environment are made from these fields (cli/flags.py). API
keys are the exception: they come from a file or the environment, for flags show in `ps`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import check_fields, checked, nearest, rules
from jaxmoe.text.reasoning import REASONING_FORMATS
from jaxmoe.text.tool_calls import TOOL_FORMATS

API_KEYS_VARIABLE = "JAXMOE_API_KEY"
MIN_KEY_CHARS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Immutable and validated: a wrong value raises ConfigError naming the option."""

    host: str = checked("127.0.0.1", "str", "address to listen on")
    port: int = checked(8000, "int", "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: str | None = checked(
        None,
        "str",
        "names the model answers to, with commas between; the first is the one shown; * answers "
        "to every name; default: the checkpoint directory's name",
        optional=True,
    )
    api_key_file: str | None = checked(
        None,
        "str",
        "file of API keys, one a line (NAME:KEY or KEY); the variable JAXMOE_API_KEY holds one, or "
        "several with commas between; default: no key is asked for",
        optional=True,
    )
    allow_unauthenticated: bool = checked(
        False, "bool", "listen on a public address without any API key"
    )
    allowed_hosts: str | None = checked(
        None,
        "str",
        "Host headers to answer to, with commas between; * is all; default: local names where the "
        "address is local and no key is asked for (against DNS rebinding), else all",
        optional=True,
    )
    allowed_origins: str | None = checked(
        None,
        "str",
        "web origins whose pages may use the API (CORS), with commas between; * is all; default: "
        "none",
        optional=True,
    )
    max_body_mb: int = checked(32, "int", "largest request body in MiB", low=1, high=1024)
    max_buffered_mb: int = checked(
        256, "int", "bodies held in memory together, in MiB", low=1, high=2**20
    )
    body_timeout_s: float = checked(
        30.0, "float", "seconds that a whole body may take to arrive", low=0.1, high=3600.0
    )
    header_timeout_s: float = checked(
        5.0,
        "float",
        "seconds that headers may take to arrive, and that an idle connection is kept",
        low=0.1,
        high=3600.0,
    )
    write_timeout_s: float = checked(
        30.0, "float", "seconds a client may leave its answer unread", low=0.1, high=3600.0
    )
    max_header_kb: int = checked(64, "int", "largest request head in KiB", low=1, high=1024)
    max_connections: int = checked(1024, "int", "open connections", low=1, high=2**16)
    max_requests_per_key: int = checked(
        128,
        "int",
        "requests of one API key in work at once; without keys there is no such bound",
        low=1,
        high=2**16,
    )
    max_completions: int = checked(
        128, "int", "completions (prompts times n) that one request may ask for", low=1, high=4096
    )
    request_timeout_s: float = checked(
        86400.0,
        "float",
        "seconds a request may take; x-request-timeout lowers it",
        low=0.1,
        high=1e7,
    )
    ping_interval_s: float = checked(
        5.0, "float", "silence after which a stream gets a comment line", low=0.05, high=3600.0
    )
    drain_timeout_s: float = checked(
        30.0, "float", "seconds that running requests get after SIGTERM", low=0.0, high=86400.0
    )
    reasoning_format: str = checked(
        "auto",
        "str",
        "how the model writes thoughts; auto goes by the chat template, none leaves them in the "
        "content",
        choices=("auto", "none", *REASONING_FORMATS),
    )
    tool_format: str = checked(
        "auto",
        "str",
        "how the model writes tool calls; auto goes by the chat template",
        choices=("auto", "none", *TOOL_FORMATS),
    )
    log_format: str = checked(
        "json", "str", "log lines as JSON objects or as text", choices=("json", "text")
    )
    engine_process: bool = checked(
        True,
        "bool",
        "run the engine in a process of its own, which is watched and started again when it dies; "
        "without, a crash of the engine ends the server",
    )
    max_engine_restarts: int = checked(
        3,
        "int",
        "times in ten minutes that an engine process is started again; after more, the server ends",
        low=0,
        high=10**6,
    )
    hang_timeout_s: float = checked(
        60.0,
        "float",
        "seconds without a step, while requests wait, after which an engine process is ended and "
        "started again; never less than ten times the longest step so far; compiling "
        "has half an hour, as long as it uses the CPU",
        low=0.5,
        high=86400.0,
    )
    chat_page: bool = checked(True, "bool", "serve the chat page at /")

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ServerConfig:
        """A config with the `given` options; an unknown name is a ConfigError."""
        known = rules(cls)
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown server option {name!r}{nearest(name, known)}")
        return cls(**given)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def hosts(self, has_keys: bool) -> frozenset[str] | None:
        """Host headers to answer to, without port; None: all."""
        names = split_names(self.allowed_hosts)
        if names:
            return None if "*" in names else frozenset(n.lower() for n in names)
        if self.is_local and not has_keys:
            return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower()})
        return None


def split_names(text: str | None) -> tuple[str, ...]:
    return tuple(n for part in (text or "").split(",") if (n := part.strip()))


def read_api_keys(config: ServerConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Keys by name. Raises ConfigError: an unreadable or empty file, a key too short to be one, or
    a public address without any (unless allow_unauthenticated).
    """
    keys: dict[str, str] = {}
    if config.api_key_file is not None:
        path = Path(config.api_key_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            mode = os.stat(path).st_mode
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
            raise ConfigError(f"api_key_file: {path}: {reason}") from None
        if mode & 0o004:
            raise ConfigError(f"api_key_file: {path} is readable by everybody; chmod 600 it")
        lines = [s for line in lines if (s := line.strip()) and not s.startswith("#")]
        if not lines:
            raise ConfigError(f"api_key_file: {path} holds no key")
        for at, line in enumerate(lines, 1):
            name, _, key = line.rpartition(":")
            _put_key(keys, name.strip() or f"key-{at}", key.strip(), f"api_key_file: {path}")
    for at, key in enumerate(split_names(environment.get(API_KEYS_VARIABLE)), 1):
        _put_key(keys, f"env-{at}", key, API_KEYS_VARIABLE)
    if not keys and not config.is_local and not config.allow_unauthenticated:
        raise ConfigError(
            f"host: {config.host} can be reached from other machines and no API key is set; set "
            f"{API_KEYS_VARIABLE} or --api_key_file, or say --allow_unauthenticated"
        )
    return keys


def _put_key(keys: dict[str, str], name: str, key: str, where: str) -> None:
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where}: the key {name!r} has {len(key)} characters, wanted at least "
            f"{MIN_KEY_CHARS} printable ASCII ones without spaces"
        )
    if name in keys:
        raise ConfigError(f"{where}: the name {name!r} is there twice")
    keys[name] = key
