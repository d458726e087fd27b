"""Running a body's prompts through the engine: one stream of deltas for all of them.

Choice indexes run over prompts and completions together, as OpenAI numbers them. Leaving the
stream early, for whatever reason, ends every request behind it. What it does not do: shapes of
answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

from jaxmoe.common.errors import RequestError
from jaxmoe.engine.async_engine import AsyncEngine, PrefillProgress
from jaxmoe.request import CompletionOutput, Delta, RequestOutput, failure
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.errors import ApiError, renamed
from jaxmoe.serving.metrics import Metrics

# Deltas of many prompts that may wait for a slow client before their engine streams are paused.
_MAX_WAITING = 256


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt for the engine. text: what it came from, where that was text. names: what the client
    calls the engine's fields (errors.renamed).
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    text: str | None = None
    cache_salt: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one delta brings. choice: its index in the answer; prompt: which job it is of."""

    choice: int
    prompt: int
    delta: Delta


@dataclasses.dataclass
class Usage:
    """Tokens so far. reasoning_tokens: counted by whoever parses thoughts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def openai(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class Generation:
    """The jobs of one body. usage and outputs (by job) fill as `steps` is read."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, jobs: Sequence[Job]) -> None:
        self._engine = engine
        self._metrics = metrics
        self.jobs = jobs
        self.usage = Usage(prompt_tokens=sum(len(j.prompt_token_ids) for j in jobs))
        self.outputs: list[RequestOutput | None] = [None] * len(jobs)
        self.num_choices = sum(j.params.n for j in jobs)

    async def steps(self) -> AsyncGenerator[Step | PrefillProgress]:
        """Ends when every completion has ended.

        Raises what AsyncEngine.generate raises, and ApiError 500 where the model's logits were not
        finite or a grammar failed.
        """
        source = self._one(0) if len(self.jobs) == 1 else self._many()
        async with contextlib.aclosing(source):
            async for prompt, item in source:
                if isinstance(item, PrefillProgress):
                    yield item
                    continue
                if item.finish_reason == "error":
                    raise ApiError(500, failure(item), code="model_error")
                self.usage.completion_tokens += len(item.token_ids)
                if item.output is not None:
                    self._note_output(prompt, item.output)
                yield Step(prompt * self.jobs[0].params.n + item.index, prompt, item)

    async def finish(self) -> list[CompletionOutput]:
        """Everything at once: the completions by choice."""
        async with contextlib.aclosing(self.steps()) as steps:
            async for _ in steps:
                pass
        return [c for o in self.outputs if o is not None for c in o.outputs]

    async def _one(self, prompt: int) -> AsyncGenerator[tuple[int, Delta | PrefillProgress]]:
        job = self.jobs[prompt]
        try:
            stream = self._engine.generate(
                job.request_id, job.prompt_token_ids, job.params, cache_salt=job.cache_salt
            )
        except RequestError as e:
            raise renamed(e, job.names) from e
        try:
            async for item in stream:
                yield prompt, item
        except RequestError as e:
            raise renamed(e, job.names) from e
        finally:
            await _close(stream)

    async def _many(self) -> AsyncGenerator[tuple[int, Delta | PrefillProgress]]:
        queue: asyncio.Queue[tuple[int, Delta | PrefillProgress] | BaseException | None]
        queue = asyncio.Queue(_MAX_WAITING)

        async def pump(prompt: int) -> None:
            try:
                async with contextlib.aclosing(self._one(prompt)) as items:
                    async for item in items:
                        await queue.put(item)
                await queue.put(None)
            except Exception as e:
                await queue.put(e)

        tasks = [asyncio.create_task(pump(i)) for i in range(len(self.jobs))]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note_output(self, prompt: int, output: RequestOutput) -> None:
        self.outputs[prompt] = output
        self.usage.cached_tokens += output.outputs[0].timings.cached_tokens
        for c in output.outputs:
            self._metrics.observe_completion(c.timings)


async def _close(stream: AsyncIterator[Delta | PrefillProgress]) -> None:
    close = getattr(stream, "aclose", None)  # an AsyncIterator need not have one
    if close is not None:
        await close()
