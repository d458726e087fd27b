"""Drives an offline batch: reads lines ahead of the engine, writes each answer when it is there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxmoe.cli.batch_lines import MAX_LINE_BYTES, Item, LineError, error_record, parse_line, record
from jaxmoe.cli.batch_output import DUPLICATE, BatchOutputs
from jaxmoe.common.errors import ConfigError, RequestError
from jaxmoe.llm import LLM
from jaxmoe.request import RequestOutput, failure
from jaxmoe.sampling_params import SamplingParams


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


@dataclasses.dataclass
class _Running:
    item: Item
    request_ids: list[str]
    outputs: dict[str, RequestOutput] = dataclasses.field(default_factory=dict)


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
        done: called after every line that is finished, with the totals so far.
    """

    def __init__(
        self,
        llm: LLM,
        outputs: BatchOutputs,
        base: SamplingParams,
        model: str,
        done: Callable[[Totals], None] = lambda totals: None,
    ) -> None:
        self.totals = Totals()
        self._llm = llm
        self._engine = llm.engine
        self._outputs = outputs
        self._base = base
        self._model = model
        self._done = done
        self._running: dict[str, _Running] = {}
        self._seen: set[str] = set()

    def run(self, path: Path) -> Totals:
        """Answers every line of the file; lines are read no further ahead than keeps the
        engine busy.
        """
        start = time.perf_counter()
        lines = _lines(path)
        more = True
        ahead = 2 * self._engine.max_num_seqs
        while more or self._running:
            while more and len(self._running) < ahead:
                numbered = next(lines, None)
                more = numbered is not None
                if numbered is not None:
                    self._begin(*numbered)
            for delta in self._engine.step():
                if delta.output is not None:
                    self._finish(delta.output)
            self.totals.seconds = time.perf_counter() - start
        return self.totals

    def _begin(self, number: int, raw: bytes) -> None:
        try:
            item = parse_line(raw, number, self._base)
        except LineError as e:
            self._refuse(number, e)
            return
        if item.custom_id is not None and item.custom_id in self._seen:
            message = f"custom_id: {item.custom_id!r} is that of an earlier line; wanted a new one"
            self._refuse(number, LineError(DUPLICATE, message, item.custom_id))
            return
        if item.custom_id is not None:
            self._seen.add(item.custom_id)
        if self._outputs.is_done(number, item.custom_id):
            self.totals.skipped += 1
            self._done(self.totals)
            return
        request_ids: list[str] = []
        try:
            for prompt in item.prompts:
                ids = self._prompt_ids(item, prompt)
                request_ids.append(self._engine.add_request(ids, item.params))
        except RequestError as e:
            for request_id in request_ids:
                self._engine.abort(request_id)
            self._refuse(number, LineError("invalid_request", str(e), item.custom_id))
            return
        running = _Running(item, request_ids)
        self._running |= dict.fromkeys(request_ids, running)

    def _prompt_ids(self, item: Item, prompt: object) -> list[int]:
        if item.is_chat:
            return self._llm.chat_prompt(prompt, **item.template_args)  # pyright: ignore
        return self._llm.prompt_ids(prompt)  # pyright: ignore[reportArgumentType]

    def _finish(self, output: RequestOutput) -> None:
        running = self._running.pop(output.request_id)
        running.outputs[output.request_id] = output
        if len(running.outputs) < len(running.request_ids):
            return
        item = running.item
        outputs = [running.outputs[i] for i in running.request_ids]
        failed = [c for o in outputs for c in o.outputs if c.finish_reason == "error"]
        if failed:
            self._refuse(item.line, LineError("model_error", failure(failed[0]), item.custom_id))
            return
        self._outputs.answers.write(record(item, outputs, self._model, self._llm.tokenizer))
        self.totals.answered += 1
        self.totals.prompt_tokens += sum(len(o.prompt_token_ids) for o in outputs)
        self.totals.output_tokens += sum(len(c.token_ids) for o in outputs for c in o.outputs)
        self._done(self.totals)

    def _refuse(self, number: int, error: LineError) -> None:
        known = (
            self._outputs.is_known_duplicate(number)
            if error.code == DUPLICATE
            else self._outputs.is_done(number, error.custom_id)
        )
        if known:
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
