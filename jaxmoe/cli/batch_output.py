"""The output file of an offline batch: appended line by line, and picked up again after a kill.

Every record is one write of one whole line. What a killed run left half-written at the end is cut
off when the file is opened again; what it finished is not computed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
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

    def __init__(self, path: str | os.PathLike[str], *, drop_errors: bool = False) -> None:
        """drop_errors: takes the records with an error out, so that their lines are asked again."""
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
            self._read(drop_errors)
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

    def _read(self, drop_errors: bool) -> None:
        whole, number, dropped = 0, 0, False
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
                if drop_errors and record["error"] is not None:
                    dropped = True
                else:
                    self._note(record)
                if not raw.endswith(b"\n"):
                    os.write(self._fd, b"\n")  # whole, but for its end
                    whole += 1
        if whole < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, whole)
        if dropped:
            self._rewrite()

    def _rewrite(self) -> None:
        """Without the records with an error. A kill leaves the file as it was, or as it will be."""
        path = self.path.resolve()  # what a link points to is replaced, not the link
        new_path = path.with_name(f".{path.name}.new")
        new = os.open(new_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(new, stat.S_IMODE(os.fstat(self._fd).st_mode))
            with open(os.dup(self._fd), "rb") as f, open(os.dup(new), "ab") as out:
                f.seek(0)
                out.writelines(raw for raw in f if orjson.loads(raw)["error"] is None)
                out.flush()
                os.fsync(new)
            os.replace(new_path, path)
        except BaseException:
            os.close(new)
            raise
        os.close(self._fd)
        self._fd = new

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


class BatchOutputs:
    """Where answers go, and where records of lines with an error go: often the same file."""

    def __init__(self, answers: BatchOutput, errors: BatchOutput) -> None:
        self.answers = answers
        self.errors = errors

    def is_done(self, line: int, custom_id: str | None) -> bool:
        return self.answers.is_done(line, custom_id) or self.errors.is_done(line, custom_id)

    def is_known_duplicate(self, line: int) -> bool:
        return self.answers.is_known_duplicate(line) or self.errors.is_known_duplicate(line)


@contextlib.contextmanager
def open_outputs(
    in_path: Path,
    out_path: Path,
    errors_path: Path | None = None,
    *,
    retry_errors: bool = False,
) -> Iterator[BatchOutputs]:
    """The files of a batch, none of which may be another; without `errors_path` errors go to
    `out_path`. retry_errors: takes the records with an error out of both.
    """
    if out_path.exists() and in_path.resolve() == out_path.resolve():
        raise ConfigError(f"--output: {out_path} is the input; wanted another file")
    if errors_path is not None and errors_path.resolve() in (in_path.resolve(), out_path.resolve()):
        raise ConfigError(f"--errors: {errors_path} is the input or output; wanted another file")
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(BatchOutput(out_path, drop_errors=retry_errors))
        errors = answers
        if errors_path is not None:
            errors = stack.enter_context(BatchOutput(errors_path, drop_errors=retry_errors))
        yield BatchOutputs(answers, errors)
