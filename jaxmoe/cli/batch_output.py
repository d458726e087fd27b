"""The output file of an offline batch: appended line by line, and picked up again after a kill.

Every record is one write of one whole line. What a killed run left half-written at the end is cut
off when the file is opened again; what it finished is not computed again.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import orjson

from jaxmoe.common.errors import ConfigError

DUPLICATE = "duplicate_id"


class BatchOutput:
    """Holds the file locked while it is open.

    A line with an id of its own is known by it, so lines may move in the input between runs; the
    others are known by their number.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise ConfigError(f"output {self.path}: {e.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise ConfigError(
                f"output {self.path}: not a regular file, which a later run could go on with"
            )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ConfigError(f"output {self.path}: another run is writing to it") from None
        self._ids: set[str] = set()
        self._lines: set[int] = set()
        self._duplicate_lines: set[int] = set()
        try:
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def is_done(self, line: int, custom_id: str | None) -> bool:
        return line in self._lines if custom_id is None else custom_id in self._ids

    def is_known_duplicate(self, line: int) -> bool:
        return line in self._duplicate_lines

    def write(self, record: dict[str, Any]) -> None:
        data = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        written = 0
        while written < len(data):  # a disk that fills up writes less, then raises
            written += os.write(self._fd, data[written:])

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> None:
        whole, number = 0, 0
        with open(os.dup(self._fd), "rb") as f:
            f.seek(0)
            for raw in f:
                number += 1
                record = self._parse(raw)
                if record is None and not raw.endswith(b"\n"):
                    break  # half-written
                if record is None:
                    raise ConfigError(
                        f"output {self.path}: line {number} is no record of this command; choose "
                        "another file"
                    )
                whole += len(raw)
                self._note(record)
                if not raw.endswith(b"\n"):
                    os.write(self._fd, b"\n")  # whole, but for its end
                    whole += 1
        if whole < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, whole)

    @staticmethod
    def _parse(raw: bytes) -> dict[str, Any] | None:
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(record, dict) or not isinstance(record.get("line"), int):
            return None
        return record if "custom_id" in record and "error" in record else None

    def _note(self, record: dict[str, Any]) -> None:
        error = record["error"]
        if isinstance(error, dict) and error.get("code") == DUPLICATE:
            self._duplicate_lines.add(record["line"])
        elif isinstance(record["custom_id"], str):
            self._ids.add(record["custom_id"])
        else:
            self._lines.add(record["line"])
