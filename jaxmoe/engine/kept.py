"""Small JSON files of what was measured on this machine, by what it holds for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def read(file: Path | None) -> dict[str, Any]:
    """What is kept; nothing where the file is missing or not ours."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        _log.warning("%s cannot be read and will be written anew: %s", file, e)
        return {}
    if not isinstance(content, dict):
        _log.warning("%s is not an object of answers and will be written anew", file)
        return {}
    return content


def write(file: Path, content: Mapping[str, Any]) -> bool:
    """Whole or not at all; a folder that cannot be written only costs the next start its time."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(file)
        return True
    except OSError as e:
        _log.warning("%s is not kept: %s", file, e.strerror)
        with contextlib.suppress(OSError):
            part.unlink()
        return False
