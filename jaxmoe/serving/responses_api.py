"""/v1/responses: OpenAI's Responses API without its memory. Nothing is stored; clients send all
items every time, and requests that name stored ones are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.serving.chat_prompt import AUTO, ChatRequest, prepare
from jaxmoe.serving.chat_stream import ChatStream, Part
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import Body
from jaxmoe.serving.logprobs import TokenTexts, chat_logprobs
from jaxmoe.serving.replies import JsonReply, Reply, StreamReply, event
from jaxmoe.serving.state import Call, ServerState
from jaxmoe.text.tool_calls import ToolCallDelta


async def handle(state: ServerState, call: Call) -> Reply:
    """Raises ApiError and RequestError before anything is sent."""
    body = call.body
    info = state.info()
    state.check_model(body.get("model"))
    answer_id = f"resp_{uuid.uuid4().hex}"
    job = await state.off_loop(prepare, state, info, _as_chat_request(body), answer_id)
    answer = _Answer(state, info, body, ChatStream(state, job), answer_id)
    if body["stream"]:
        return StreamReply(answer.events(), answer.opening(), answer.error_event)
    return JsonReply(await answer.whole())


def _as_chat_request(body: Body) -> ChatRequest:
    messages = list(body["input"])
    if body.given("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    sampling = body.sampling()
    if body.given("top_logprobs") or "message.output_text.logprobs" in body.get("include", ()):
        sampling["logprobs"] = body.get("top_logprobs", 0)
    effort = body.get("reasoning")
    return ChatRequest(
        messages=messages,
        sampling=sampling,
        tools=body.get("tools", ()),
        tool_choice=body.get("tool_choice", AUTO),
        parallel_tool_calls=body["parallel_tool_calls"],
        output_format=body.get("text"),
        template_kwargs=body.get("chat_template_kwargs", {}),
        thinking=None if effort is None else effort != "none",
        effort=effort,
        cache_salt=body.get("cache_salt"),
        messages_param="input",
        names={**body.client_names(), "logprobs": "top_logprobs"},
    )


@dataclasses.dataclass
class _Item:
    """An output item as it grows. text: its text, thoughts, or arguments."""

    kind: str  # "message", "reasoning" or "function_call"
    id: str
    text: str = ""
    call: ToolCallDelta | None = None
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def part(self) -> dict[str, Any]:
        """The content part that the item's text is in."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": self.logprobs,
        }

    def shown(self, status: str) -> dict[str, Any]:
        done = status != "in_progress"
        if self.call is not None:
            return {
                "id": self.id,
                "type": "function_call",
                "status": status,
                "call_id": self.call.id,
                "name": self.call.name,
                "arguments": self.text,
            }
        if self.kind == "reasoning":
            content = [self.part()] if done else []
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content}
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self.part()] if done else [],
        }


class _Answer:
    def __init__(
        self, state: ServerState, info: EngineInfo, body: Body, stream: ChatStream, answer_id: str
    ) -> None:
        self._state = state
        self._body = body
        self._stream = stream
        self._id = answer_id
        self._created = int(time.time())
        self._params = stream.job.job.params
        self._texts = TokenTexts.of(state.texts.tokenizer, self._params, info)
        self._items: list[_Item] = []
        self._calls: dict[int, int] = {}  # item of each call
        self._open = False  # whether the last item is still growing
        self._finish_reason: str | None = None
        # Of tokens whose text is not certain yet: parts of characters, of tags, of stop strings.
        self._held_logprobs: list[dict[str, Any]] = []
        self._sequence = 0

    def _response(self, status: str, error: ApiError | None = None) -> dict[str, Any]:
        body, usage = self._body, self._stream.usage
        choice = body.get("tool_choice", AUTO)
        finished = status != "in_progress"
        format: dict[str, Any] = {"type": "text"}
        if (given := body.get("text")) is not None:
            format = {"type": given.kind}
            if given.kind == "json_schema":
                format |= {"name": given.name, "schema": given.value}
        out = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self._state.model,
            "output": [],
            "parallel_tool_calls": body["parallel_tool_calls"],
            "previous_response_id": None,
            "reasoning": {"effort": body.get("reasoning"), "summary": None},
            "store": False,
            "temperature": self._params.temperature,
            "text": {"format": format},
            "tool_choice": {"type": "function", "name": choice.name}
            if choice.mode == "named"
            else choice.mode,
            "tools": [_shown_tool(t) for t in body.get("tools", ())],
            "top_logprobs": body.get("top_logprobs", 0),
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": body.get("metadata", {}),
        }
        if finished:
            out["output"] = [i.shown("completed") for i in self._items]
            out["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        if status == "incomplete":
            # "abort" is jaxmoe's own: the server stopped the answer before its end.
            reason = "abort" if self._finish_reason == "abort" else "max_output_tokens"
            out["incomplete_details"] = {"reason": reason}
            if out["output"]:
                out["output"][-1] = self._items[-1].shown("incomplete")
        if error is not None:
            out["error"] = {"code": error.code or "server_error", "message": error.message}
        return out

    def _status(self) -> str:
        return "incomplete" if self._finish_reason in ("length", "abort") else "completed"

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self._response(self._status())

    def _event(self, kind: str, **values: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._sequence, **values}
        self._sequence += 1
        return event(value, kind)

    def opening(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def error_event(self, error: ApiError) -> bytes:
        return self._event("response.failed", response=self._response("failed", error))

    async def events(self) -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(self._stream.parts()) as parts:
            async for part in parts:
                if isinstance(part, PrefillProgress):
                    continue
                if data := b"".join(self._part(part)):
                    yield data
        status = self._status()
        last = self._close(status)
        yield last + self._event(f"response.{status}", response=self._response(status))

    def _part(self, part: Part) -> Iterable[bytes]:
        message = part.message
        if part.finish_reason is not None:
            self._finish_reason = part.finish_reason
        if message.reasoning:  # what was held back were thoughts
            self._held_logprobs = []
            yield from self._text("reasoning", message.reasoning, [])
        if part.logprobs is not None:
            _, shown = self._texts.shown(part.token_ids, part.logprobs, part.finish_reason)
            self._held_logprobs += chat_logprobs(shown, self._texts)["content"]
        if message.content:
            logprobs, self._held_logprobs = self._held_logprobs, []
            if not self._open or self._items[-1].kind != "message":
                logprobs = _of_text(logprobs, message.content)
            yield from self._text("message", message.content, logprobs)
        elif message.reasoning or message.tool_calls:
            self._held_logprobs = []
        for call in message.tool_calls:
            if call.index not in self._calls:
                yield self._start(_Item("function_call", f"fc_{uuid.uuid4().hex}", call=call))
                self._calls[call.index] = len(self._items) - 1
            if call.arguments:
                at = self._calls[call.index]
                self._items[at].text += call.arguments
                yield self._event(
                    "response.function_call_arguments.delta",
                    item_id=self._items[at].id,
                    output_index=at,
                    delta=call.arguments,
                )

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterable[bytes]:
        if not self._open or self._items[-1].kind != kind:
            prefix = "rs" if kind == "reasoning" else "msg"
            yield self._start(_Item(kind, f"{prefix}_{uuid.uuid4().hex}"))
        item, at = self._items[-1], len(self._items) - 1
        item.text += text
        item.logprobs += logprobs
        place = {"item_id": item.id, "output_index": at, "content_index": 0}
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", **place, delta=text)
        else:
            yield self._event("response.output_text.delta", **place, delta=text, logprobs=logprobs)

    def _start(self, item: _Item) -> bytes:
        data = self._close("completed")
        self._items.append(item)
        self._open = True
        at = len(self._items) - 1
        data += self._event(
            "response.output_item.added", output_index=at, item=item.shown("in_progress")
        )
        if item.call is None:
            data += self._event(
                "response.content_part.added",
                item_id=item.id,
                output_index=at,
                content_index=0,
                part=item.part(),
            )
        return data

    def _close(self, status: str) -> bytes:
        """The last item's end; nothing where none is open."""
        if not self._open:
            return b""
        self._open = False
        item, at = self._items[-1], len(self._items) - 1
        place = {"item_id": item.id, "output_index": at}
        if item.call is not None:
            data = self._event(
                "response.function_call_arguments.done",
                **place,
                name=item.call.name,
                arguments=item.text,
            )
        else:
            place["content_index"] = 0
            if item.kind == "reasoning":
                data = self._event("response.reasoning_text.done", **place, text=item.text)
            else:
                data = self._event(
                    "response.output_text.done", **place, text=item.text, logprobs=item.logprobs
                )
            data += self._event("response.content_part.done", **place, part=item.part())
        return data + self._event(
            "response.output_item.done", output_index=at, item=item.shown(status)
        )


def _of_text(logprobs: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Without the tokens before a message's first text, such as the tag that ended the thoughts."""
    pieces, wanted = [bytes(e["bytes"] or ()) for e in logprobs], text.encode()
    at = 0
    while wanted in b"".join(pieces[at + 1 :]):
        at += 1
    return logprobs[at:]


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "strict": False, **tool["function"]}
