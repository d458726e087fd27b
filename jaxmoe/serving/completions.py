"""/v1/completions: plain continuation of one prompt or many, whole or as chunks.

`echo` begins the text with the prompt, and with `logprobs` gives the prompt's tokens theirs, which
is what evaluation harnesses score multiple-choice tasks by; with max_tokens 0 nothing is added.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from jaxmoe.common.errors import RequestError
from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.request import CompletionOutput, RequestOutput, TokenLogprob
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.errors import bad_field, renamed
from jaxmoe.serving.fields import Body
from jaxmoe.serving.generation import Generation, Job, Step
from jaxmoe.serving.logprobs import TokenTexts, completion_logprobs, prompt_logprobs_object
from jaxmoe.serving.replies import DONE, JsonReply, Reply, StreamReply, event
from jaxmoe.serving.state import Call, ServerState
from jaxmoe.serving.structured import plain_constraint
from jaxmoe.serving.timings import prompt_progress, timings_object


async def handle(state: ServerState, call: Call) -> Reply:
    """Raises ApiError and RequestError before anything is sent."""
    body = call.body
    info = state.info()
    state.check_model(body.get("model"))
    _check(state, body)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    jobs = await state.off_loop(_prepare, state, info, body, answer_id)
    answer = _Answer(state, info, body, jobs, answer_id)
    if body["stream"]:
        return StreamReply(answer.chunks())
    return JsonReply(await answer.whole())


def _check(state: ServerState, body: Body) -> None:
    count = len(body["prompt"]) * body.get("n", 1)
    if count > state.config.max_completions:
        raise bad_field(
            "n"
            if body.given("n") and len(body["prompt"]) <= state.config.max_completions
            else "prompt",
            f"{len(body['prompt'])} prompts times n = {count} completions, wanted at most "
            f"{state.config.max_completions} (max_completions)",
        )
    if body.given("stream_options") and not body["stream"]:
        raise bad_field("stream_options", "only together with stream: true")
    if body.given("prompt_logprobs") and body["stream"]:
        raise bad_field("prompt_logprobs", "not together with stream: true; echo and logprobs are")
    if body["max_tokens"] == 0 and not body["echo"]:
        raise bad_field("max_tokens", "got 0, which asks for nothing without echo")
    if body.given("response_format") and body.given("structured_outputs"):
        raise bad_field("structured_outputs", "not together with response_format")


def _prepare(state: ServerState, info: EngineInfo, body: Body, answer_id: str) -> list[Job]:
    """Runs in a thread."""
    given = body.sampling()
    if body["max_tokens"] == 0:
        given["max_tokens"] = 1  # the engine has to take a step; its token is dropped
    if body["echo"] and body.given("logprobs"):
        given["prompt_logprobs"] = body["logprobs"]
    if body.given("prompt_logprobs"):
        given["prompt_logprobs"] = max(body["prompt_logprobs"], given.get("prompt_logprobs", 0))
    format = body.get("response_format") or body.get("structured_outputs")
    structured = plain_constraint(format)
    names = body.client_names()
    if structured is not None and format is not None:
        given["structured"] = structured
        names[structured.kind] = format.param
    try:
        params = SamplingParams.of(given, info.default_params)
    except RequestError as e:
        raise renamed(e, names) from e
    jobs = []
    for at, prompt in enumerate(body["prompt"]):
        text = None
        if isinstance(prompt, str):
            text = prompt
            ids: Sequence[int] = state.encode(
                prompt, "prompt", info.max_model_len, special=body["add_special_tokens"]
            )
        else:
            ids = prompt
        if body.given("truncate_prompt_tokens"):
            ids = ids[-body["truncate_prompt_tokens"] :]
        names = {**names, "prompt": "prompt" if len(body["prompt"]) == 1 else f"prompt[{at}]"}
        jobs.append(Job(f"{answer_id}-{at}", ids, params, text, body.get("cache_salt"), names))
    return jobs


class _Answer:
    """One body's answer; its id, time and model are the same in every chunk."""

    def __init__(
        self,
        state: ServerState,
        info: EngineInfo,
        body: Body,
        jobs: Sequence[Job],
        answer_id: str,
    ) -> None:
        self._state = state
        self._body = body
        self._jobs = jobs
        self._generation = Generation(state.engine, state.metrics, jobs)
        self._id = answer_id
        self._created = int(time.time())
        self._texts = TokenTexts.of(state.texts.tokenizer, jobs[0].params, info)
        options = body.get("stream_options", {})
        self._continuous = options.get("continuous_usage_stats", False)
        self._include_usage = options.get("include_usage", False) or self._continuous
        self._only_echo = body["max_tokens"] == 0
        # A prompt's text as echoed; one given as ids is decoded as it will be continued.
        self._echoes = [self._echo(job) if body["echo"] else "" for job in jobs]

    def _echo(self, job: Job) -> str:
        if job.text is not None:
            return job.text
        if self._texts.tokenizer is None:
            return ""
        return self._texts.tokenizer.decode(job.prompt_token_ids)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._state.model,
            "system_fingerprint": None,
        }

    def _usage(self) -> dict[str, object]:
        if self._only_echo:
            self._generation.usage.completion_tokens = 0
        return self._generation.usage.openai()

    async def whole(self) -> dict[str, Any]:
        await self._generation.finish()
        outputs = [o for o in self._generation.outputs if o is not None]
        n = self._jobs[0].params.n
        choices = [
            self._choice(p * n + c.index, p, output, c)
            for p, output in enumerate(outputs)
            for c in output.outputs
        ]
        out = {**self._head(), "choices": choices, "usage": self._usage()}
        if self._body["timings"]:
            out["timings"] = timings_object(c for o in outputs for c in o.outputs)
        return out

    def _choice(
        self, index: int, prompt: int, output: RequestOutput, c: CompletionOutput
    ) -> dict[str, Any]:
        text, logprobs = self._echoes[prompt], None
        ids: Sequence[int] = () if self._only_echo else c.token_ids
        if not self._only_echo:
            text += c.text
        if c.logprobs is not None:
            shown, entries = self._texts.shown(ids, c.logprobs[: len(ids)], c.finish_reason)
            logprobs = self._logprobs(prompt, output.prompt_logprobs, shown, entries)
        out: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._only_echo else c.finish_reason,
            "stop_reason": c.stop_reason,
        }
        if self._body["return_token_ids"]:
            out["prompt_token_ids"] = list(output.prompt_token_ids)
            out["token_ids"] = list(ids)
        if self._body.given("prompt_logprobs"):
            out["prompt_logprobs"] = prompt_logprobs_object(
                output.prompt_logprobs or (), self._texts
            )
        return out

    def _logprobs(
        self,
        prompt: int,
        prompt_entries: Sequence[TokenLogprob | None] | None,
        ids: Sequence[int],
        entries: Sequence[TokenLogprob],
    ) -> dict[str, Any]:
        """Of the prompt, where it is echoed, and the answer in one."""
        if not self._body["echo"]:
            return completion_logprobs(entries, ids, self._texts, 0)
        prompt_ids = self._jobs[prompt].prompt_token_ids
        known = prompt_entries or (None,) * len(prompt_ids)
        return completion_logprobs([*known, *entries], [*prompt_ids, *ids], self._texts, 0)

    async def chunks(self) -> AsyncGenerator[bytes]:
        written: dict[int, int] = {}  # characters by choice, for the offsets of logprobs
        async with contextlib.aclosing(self._generation.steps()) as steps:
            async for step in steps:
                if isinstance(step, PrefillProgress):
                    if self._body["return_progress"]:
                        yield self._progress(step)
                    continue
                if data := self._step(step, written):
                    yield data
        if self._include_usage or self._body["timings"]:
            value = {**self._head(), "choices": []}
            if self._include_usage:
                value["usage"] = self._usage()
            if self._body["timings"]:
                outputs = self._generation.outputs
                value["timings"] = timings_object(c for o in outputs if o for c in o.outputs)
            yield event(value)
        yield DONE

    def _step(self, step: Step, written: dict[int, int]) -> bytes:
        delta = step.delta
        first = step.choice not in written
        text, ids, entries = delta.text, delta.token_ids, delta.logprobs
        if self._only_echo:
            text, ids, entries = "", (), entries and ()
        echo = self._echoes[step.prompt] if first else ""
        with_ids = self._body["return_token_ids"]
        if not (text or echo or delta.finish_reason or entries or (with_ids and ids)):
            return b""
        offset = written.setdefault(step.choice, 0)
        logprobs = None
        if entries is not None:
            shown, entries = self._texts.shown(ids, entries, delta.finish_reason)
            if first and self._body["echo"]:
                logprobs = self._logprobs(step.prompt, delta.prompt_logprobs, shown, entries)
            else:
                logprobs = completion_logprobs(entries, shown, self._texts, offset)
            written[step.choice] += sum(len(t) for t in logprobs["tokens"])
        choice: dict[str, Any] = {
            "index": step.choice,
            "text": echo + text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if self._only_echo and delta.finish_reason:
            choice["finish_reason"] = "length"
        if with_ids:
            choice["token_ids"] = list(ids)
            if first:
                choice["prompt_token_ids"] = list(self._jobs[step.prompt].prompt_token_ids)
        value = {**self._head(), "choices": [choice]}
        if self._continuous:
            value["usage"] = self._usage()
        return event(value)

    def _progress(self, progress: PrefillProgress) -> bytes:
        shown = prompt_progress(progress)
        return event({**self._head(), "choices": [], "prompt_progress": shown})
