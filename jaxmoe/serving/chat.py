"""/v1/chat/completions: OpenAI's chat answers, whole or as chunks.

How chunks look where peers differ: the first chunk of a choice has the role and empty content; the
last text and the finish_reason come in one chunk; usage comes in a chunk of its own without
choices, before [DONE]. `logprobs` and `refusal` are always there, null or not.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.serving.chat_prompt import AUTO, ChatJob, ChatRequest, prepare
from jaxmoe.serving.chat_stream import ChatStream, Message, Part
from jaxmoe.serving.errors import bad_field
from jaxmoe.serving.fields import Body
from jaxmoe.serving.logprobs import TokenTexts, chat_logprobs, prompt_logprobs_object
from jaxmoe.serving.replies import DONE, JsonReply, Reply, StreamReply, event
from jaxmoe.serving.state import Call, ServerState
from jaxmoe.serving.timings import prompt_progress, timings_object
from jaxmoe.text.tool_calls import ToolCallDelta


async def handle(state: ServerState, call: Call) -> Reply:
    """Raises ApiError and RequestError before anything is sent."""
    body = call.body
    info = state.info()
    state.check_model(body.get("model"))
    request = as_chat_request(state, body)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    job = await state.off_loop(prepare, state, info, request, answer_id)
    answer = _Answer(state, info, body, job, answer_id)
    if body["stream"]:
        return StreamReply(answer.chunks(), answer.opening())
    return JsonReply(await answer.whole())


def as_chat_request(state: ServerState, body: Body) -> ChatRequest:
    sampling = body.sampling()
    if body.given("top_logprobs") and not body["logprobs"]:
        raise bad_field("top_logprobs", "wants logprobs to be true")
    if body["logprobs"]:
        sampling["logprobs"] = body.get("top_logprobs", 0)
    if body.given("stream_options") and not body["stream"]:
        raise bad_field("stream_options", "only together with stream: true")
    if body.given("prompt_logprobs"):
        if body["stream"]:
            raise bad_field("prompt_logprobs", "not together with stream: true")
        sampling["prompt_logprobs"] = body["prompt_logprobs"]
    if body.get("n", 1) > state.config.max_completions:
        raise bad_field("n", f"got {body['n']}, wanted at most {state.config.max_completions}")
    if body.given("response_format") and body.given("structured_outputs"):
        raise bad_field("structured_outputs", "not together with response_format")
    effort = body.get("reasoning_effort")
    names = body.client_names()
    return ChatRequest(
        messages=body["messages"],
        sampling=sampling,
        tools=body.get("tools", ()),
        tool_choice=body.get("tool_choice", AUTO),
        parallel_tool_calls=body["parallel_tool_calls"],
        output_format=body.get("response_format") or body.get("structured_outputs"),
        template_kwargs=body.get("chat_template_kwargs", {}),
        thinking=None if effort is None else effort != "none",
        effort=effort,
        add_generation_prompt=body["add_generation_prompt"],
        continue_final_message=body["continue_final_message"],
        truncate=body.get("truncate_prompt_tokens"),
        cache_salt=body.get("cache_salt"),
        names=names,
    )


class _Answer:
    """One body's answer; its id, time and model are the same in every chunk."""

    def __init__(
        self, state: ServerState, info: EngineInfo, body: Body, job: ChatJob, answer_id: str
    ) -> None:
        self._state = state
        self._body = body
        self._stream = ChatStream(state, job)
        self._job = job.job
        self._id = answer_id
        self._created = int(time.time())
        self._texts = TokenTexts.of(state.texts.tokenizer, job.job.params, info)
        options = body.get("stream_options", {})
        self._continuous = options.get("continuous_usage_stats", False)
        self._include_usage = options.get("include_usage", False) or self._continuous

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._state.model,
            "system_fingerprint": None,
        }

    async def whole(self) -> dict[str, Any]:
        messages = await self._stream.finish()
        out = {
            **self._head("chat.completion"),
            "choices": [self._choice(i, m) for i, m in enumerate(messages)],
            "usage": self._stream.usage.openai(),
        }
        if self._body["return_token_ids"]:
            out["prompt_token_ids"] = list(self._job.prompt_token_ids)
        if self._body.given("prompt_logprobs"):
            (output,) = self._stream.generation.outputs
            entries = None if output is None else output.prompt_logprobs
            out["prompt_logprobs"] = prompt_logprobs_object(entries or (), self._texts)
        if self._body["timings"]:
            out["timings"] = timings_object(m.completion for m in messages)
        return out

    def _choice(self, index: int, message: Message) -> dict[str, Any]:
        completion = message.completion
        shown: dict[str, Any] = {
            "role": "assistant",
            "content": message.content,
            "refusal": None,
        }
        if message.calls:
            shown["tool_calls"] = [_whole_call(c) for c in message.calls]
            shown["content"] = message.content or None
        if message.reasoning and self._body["include_reasoning"]:
            shown["reasoning_content"] = message.reasoning
        out: dict[str, Any] = {
            "index": index,
            "message": shown,
            "logprobs": None,
            "finish_reason": message.finish_reason,
        }
        if completion is not None:
            if completion.logprobs is not None:
                out["logprobs"] = self._logprobs(
                    completion.token_ids, completion.logprobs, completion.finish_reason
                )
            out["stop_reason"] = completion.stop_reason
            if self._body["return_token_ids"]:
                out["token_ids"] = list(completion.token_ids)
        return out

    def _logprobs(self, ids: Any, entries: Any, finish_reason: str | None) -> dict[str, Any]:
        _, shown = self._texts.shown(ids, entries, finish_reason)
        return chat_logprobs(shown, self._texts)

    def opening(self) -> bytes:
        """The first chunk of every choice."""
        return b"".join(
            self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self._job.params.n)
        )

    async def chunks(self) -> AsyncGenerator[bytes]:
        first: dict[int, bool] = {}
        async with contextlib.aclosing(self._stream.parts()) as parts:
            async for part in parts:
                if isinstance(part, PrefillProgress):
                    if self._body["return_progress"]:
                        yield self._progress(part)
                    continue
                if data := self._part(part, first.get(part.choice, True)):
                    first[part.choice] = False
                    yield data
        if self._body["timings"] or self._include_usage:
            usage = self._stream.usage.openai() if self._include_usage else None
            value = {**self._head("chat.completion.chunk"), "choices": []}
            if usage is not None:
                value["usage"] = usage
            if self._body["timings"]:
                outputs = self._stream.generation.outputs
                value["timings"] = timings_object(c for o in outputs if o for c in o.outputs)
            yield event(value)
        yield DONE

    def _part(self, part: Part, first: bool) -> bytes:
        """The chunk of a part; empty where there is nothing to say."""
        message, delta = part.message, {}
        if message.reasoning and self._body["include_reasoning"]:
            delta["reasoning_content"] = message.reasoning
        if message.content:
            delta["content"] = message.content
        if message.tool_calls:
            delta["tool_calls"] = [_call_delta(c) for c in message.tool_calls]
        ids = self._body["return_token_ids"] and part.token_ids
        if not (delta or part.finish_reason or part.logprobs or ids):
            return b""
        logprobs = None
        if part.logprobs is not None:
            logprobs = self._logprobs(part.token_ids, part.logprobs, part.finish_reason)
        more: dict[str, Any] = {}
        if ids:
            more["token_ids"] = list(part.token_ids)
        top: dict[str, Any] = {}
        if first and self._body["return_token_ids"]:
            top["prompt_token_ids"] = list(self._job.prompt_token_ids)
        return self._chunk(part.choice, delta, part.finish_reason, logprobs, more, top)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        top: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            **(more or {}),
        }
        value = {**self._head("chat.completion.chunk"), "choices": [choice], **(top or {})}
        if self._continuous:
            value["usage"] = self._stream.usage.openai()
        return event(value)

    def _progress(self, progress: PrefillProgress) -> bytes:
        value = {
            **self._head("chat.completion.chunk"),
            "choices": [],
            "prompt_progress": prompt_progress(progress),
        }
        return event(value)


def _whole_call(call: ToolCallDelta) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    out: dict[str, Any] = {"index": call.index}
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is not None:
        out |= {"id": call.id, "type": "function"}
        function = {"name": call.name, **function}
    return {**out, "function": function}
