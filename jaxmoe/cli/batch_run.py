"""Drives an offline batch: reads lines ahead of the engine, writes each answer when it is there."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxmoe.cli.batch_answers import Answer, Answerer, Asked, answering
from jaxmoe.cli.batch_lines import MAX_LINE_BYTES, LineError, error_record, parse_line
from jaxmoe.cli.batch_output import DUPLICATE, BatchOutputs
from jaxmoe.common.errors import ConfigError
from jaxmoe.llm import LLM
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.text.output_parser import OutputFormats


@dataclasses.dataclass
class Totals:
    """What a run did. skipped: lines that an earlier run had answered."""

    answered: int = 0
    errors: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0

    def describe(self) -> str:
        rate = self.output_tokens / max(self.seconds, 1e-9)
        return (
            f"{self.answered} answered, {self.errors} with an error, {self.skipped} done before; "
            f"{self.prompt_tokens} prompt + {self.output_tokens} output tokens in "
            f"{self.seconds:.1f} s, {rate:.1f} tok/s"
        )


def count_lines(path: Path) -> int:
    """Lines of the input that are not blank."""
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"input {path}: is a pipe or a terminal, not a regular file, and would be empty when "
            "it is read for its requests; write them to a file first"
        )
    try:
        with path.open("rb") as f:
            return sum(1 for line in f if line.strip())
    except OSError as e:
        raise ConfigError(f"input {path}: {e.strerror}") from None


class BatchRun:
    """One pass over an input file.

    Args:
        base: sampling parameters that lines may override.
        model: its name in the answers.
        formats: how it writes thoughts and tool calls.
        done: called after every line that is finished, with the totals so far.
    """

    def __init__(
        self,
        llm: LLM,
        outputs: BatchOutputs,
        base: SamplingParams,
        model: str,
        formats: OutputFormats,
        done: Callable[[Totals], None] = lambda totals: None,
    ) -> None:
        self.totals = Totals()
        self._llm = llm
        self._outputs = outputs
        self._base = base
        self._model = model
        self._formats = formats
        self._done = done
        self._seen: set[str] = set()

    def run(self, path: Path) -> Totals:
        """Answers every line of the file; lines are read no further ahead than keeps the
        engine busy. Raises EngineDeadError where the engine died: lines without a record are left
        to the next run.
        """
        asyncio.run(self._run(path))
        return self.totals

    async def _run(self, path: Path) -> None:
        start_s = time.perf_counter()
        running: dict[asyncio.Task[Answer], Asked] = {}
        lines, more, sequences = _lines(path), True, 0
        ahead = 2 * self._llm.engine.max_num_seqs
        async with answering(self._llm, self._base, self._model, self._formats) as answerer:
            try:
                while more or running:
                    while more and sequences < ahead:
                        numbered = next(lines, None)
                        more = numbered is not None
                        if numbered is not None and (asked := self._begin(answerer, *numbered)):
                            running[asyncio.create_task(answerer.answer(asked))] = asked
                            sequences += asked.sequences
                    if running:
                        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    self.totals.seconds = time.perf_counter() - start_s
                    for task in [t for t in running if t.done()]:
                        asked = running.pop(task)
                        sequences -= asked.sequences
                        self._finish(asked, task)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _begin(self, answerer: Answerer, number: int, raw: bytes) -> Asked | None:
        """What is to be answered; None for a line that was answered before or is wrong."""
        line, error = None, None
        try:
            line = parse_line(raw, number)
            custom_id = line.custom_id
        except LineError as e:
            error, custom_id = e, e.custom_id
        if custom_id is not None:
            if custom_id in self._seen:
                message = f"custom_id: {custom_id!r} is that of an earlier line; wanted a new one"
                self._refuse(number, LineError(DUPLICATE, message, custom_id))
                return None
            self._seen.add(custom_id)
        if self._outputs.is_done(number, custom_id):
            self.totals.skipped += 1
            self._done(self.totals)
            return None
        if line is not None:
            try:
                return answerer.check(line)
            except LineError as e:
                error = e
        assert error is not None
        self._refuse(number, error)
        return None

    def _finish(self, asked: Asked, task: asyncio.Task[Answer]) -> None:
        try:
            answer = task.result()
        except LineError as e:
            self._refuse(asked.line.number, e)
            return
        self._outputs.answers.write(answer.record)
        self.totals.answered += 1
        self.totals.prompt_tokens += answer.prompt_tokens
        self.totals.output_tokens += answer.output_tokens
        self._done(self.totals)

    def _refuse(self, number: int, error: LineError) -> None:
        if error.code == DUPLICATE and self._outputs.is_known_duplicate(number):
            self.totals.skipped += 1
        else:
            self._outputs.errors.write(error_record(number, error))
            self.totals.errors += 1
        self._done(self.totals)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; of a line that is too long only the beginning is kept."""
    with path.open("rb") as f:
        number = 0
        while raw := f.readline(MAX_LINE_BYTES + 2):
            number += 1
            last = raw
            while last and not last.endswith(b"\n"):
                last = f.readline(1 << 20)
            if raw.strip():
                yield number, raw.rstrip(b"\r\n")
