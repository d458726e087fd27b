"""Log lines of the server's processes, as JSON objects or as text, one a line.

Control characters are escaped in both, so that nothing a client sends can forge a line. Prompts and
answers are never logged.
"""

from __future__ import annotations

import datetime
import logging
import sys
from typing import Any, TextIO

import orjson

_EXTRAS = ("request_id", "status", "seconds", "key")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        out: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        out |= {k: v for k in _EXTRAS if (v := getattr(record, k, None)) is not None}
        if record.exc_info:
            out["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(out, default=str).decode()


class TextFormatter(logging.Formatter):
    """One line a record; control characters are escaped here too."""

    def __init__(self) -> None:
        super().__init__("%(levelname).1s %(asctime)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        extras = [f"{k}={v}" for k in _EXTRAS if (v := getattr(record, k, None)) is not None]
        lines = text.split("\n") if record.exc_info else [text]
        shown = "\n".join(_escaped(line) for line in lines)
        return " ".join([shown, *map(_escaped, extras)]) if extras else shown


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up(form: str, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Logs of the whole process go to stderr in this form."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("jax").setLevel(logging.WARNING)
