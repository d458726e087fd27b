"""/v1/messages and /v1/messages/count_tokens: Anthropic's API on the same engine.

An answer is a list of content blocks: thinking, text, tool_use. Streams open and close them one
after another. Thoughts carry an empty signature, for nothing signs them here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.serving.chat_prompt import AUTO, ChatRequest, prepare, render
from jaxmoe.serving.chat_stream import ChatStream, Part
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.field_checks import OutputConfig
from jaxmoe.serving.fields import Body
from jaxmoe.serving.replies import JsonReply, Reply, StreamReply, event
from jaxmoe.serving.state import Call, ServerState

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "abort": "pause_turn",
}


async def handle(state: ServerState, call: Call) -> Reply:
    """Raises ApiError and RequestError before anything is sent."""
    body = call.body
    info = state.info()
    state.check_model(body.get("model"))
    answer_id = f"msg_{uuid.uuid4().hex}"
    request = _as_chat_request(body)
    job = await state.off_loop(prepare, state, info, request, answer_id)
    answer = _Answer(state, body, ChatStream(state, job), answer_id)
    if body["stream"]:
        return StreamReply(answer.events(), answer.opening(), _error_event)
    return JsonReply(await answer.whole())


async def count_tokens(state: ServerState, call: Call) -> Reply:
    info = state.info()
    state.check_model(call.body.get("model"))
    request = _as_chat_request(call.body)

    def count() -> int:
        text, _ = render(state, request)
        return len(state.encode(text, "messages", info.max_model_len, special=False))

    return JsonReply({"input_tokens": await state.off_loop(count)})


def _as_chat_request(body: Body) -> ChatRequest:
    messages = list(body["messages"])
    if body.given("system"):
        messages.insert(0, {"role": "system", "content": body["system"]})
    choice = body.get("tool_choice", AUTO)
    config = body.get("output_config", OutputConfig())
    return ChatRequest(
        messages=messages,
        sampling=body.sampling(),
        tools=body.get("tools", ()),
        tool_choice=choice,
        parallel_tool_calls=choice.parallel is not False,
        output_format=config.format,
        template_kwargs=body.get("chat_template_kwargs", {}),
        thinking=body.get("thinking"),
        effort=config.effort,
        names=body.client_names(),
        # Anthropic's way to go on with an answer: it is the last message.
        continue_final_message=_is_prefill(messages),
        cache_salt=body.get("cache_salt"),
    )


def _is_prefill(messages: list[dict[str, Any]]) -> bool:
    last = messages[-1]
    has_text = bool((last.get("content") or "").strip())
    return last["role"] == "assistant" and has_text and not last.get("tool_calls")


def _error_event(error: ApiError) -> bytes:
    return event(error.anthropic(), "error")


@dataclasses.dataclass
class _Block:
    """A content block as it grows. text: its text, thoughts, or the JSON text of its input."""

    kind: str
    text: str = ""
    call_id: str | None = None
    name: str | None = None

    def empty(self) -> dict[str, Any]:
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        if self.kind == "text":
            return {"type": "text", "text": "", "citations": None}
        return {"type": "tool_use", "id": self.call_id, "name": self.name, "input": {}}

    def whole(self) -> dict[str, Any]:
        out = self.empty()
        if self.kind == "tool_use":
            try:
                value = orjson.loads(self.text or "{}")
            except orjson.JSONDecodeError:  # cut short, or the model's mistake
                value = {"_text": self.text}
            out["input"] = value if isinstance(value, dict) else {"_value": value}
        else:
            out[self.kind] = self.text
        return out

    def delta(self, text: str) -> dict[str, Any]:
        if self.kind == "thinking":
            return {"type": "thinking_delta", "thinking": text}
        if self.kind == "text":
            return {"type": "text_delta", "text": text}
        return {"type": "input_json_delta", "partial_json": text}


class _Answer:
    def __init__(self, state: ServerState, body: Body, stream: ChatStream, answer_id: str) -> None:
        self._state = state
        self._body = body
        self._stream = stream
        self._id = answer_id
        self._blocks: list[_Block] = []
        self._calls: dict[int, int] = {}  # block of each call
        self._finish_reason = "stop"

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts tokens read from the cache apart from the others."""
        usage = self._stream.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
        }

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._state.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**self._usage(), "output_tokens": 0},
        }

    def _end(self) -> dict[str, Any]:
        reason, sequence = _STOP_REASONS[self._finish_reason], None
        (output,) = self._stream.generation.outputs
        if output is not None and isinstance(output.outputs[0].stop_reason, str):
            sequence = output.outputs[0].stop_reason
            reason = "stop_sequence" if reason == "end_turn" else reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                pass
        content = [b.whole() for b in self._blocks]
        return {**self._message(), "content": content, **self._end(), "usage": self._usage()}

    def opening(self) -> bytes:
        start = event({"type": "message_start", "message": self._message()}, "message_start")
        return start + event({"type": "ping"}, "ping")

    async def events(self) -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(self._stream.parts()) as parts:
            async for part in parts:
                if isinstance(part, PrefillProgress):
                    continue
                if data := b"".join(self._part(part)):
                    yield data
        end = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield self._stop_block() + event(end, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _part(self, part: Part) -> list[bytes]:
        message, out = part.message, []
        if message.reasoning:
            out += self._text("thinking", message.reasoning)
        if message.content:
            out += self._text("text", message.content)
        for call in message.tool_calls:
            if call.index not in self._calls:
                out.append(self._start(_Block("tool_use", "", call.id, call.name)))
                self._calls[call.index] = len(self._blocks) - 1
            if call.arguments:
                out.append(self._delta(self._calls[call.index], call.arguments))
        self._finish_reason = part.finish_reason or self._finish_reason
        return out

    def _text(self, kind: str, text: str) -> list[bytes]:
        out = []
        if not self._blocks or self._blocks[-1].kind != kind:
            out.append(self._start(_Block(kind)))
        out.append(self._delta(len(self._blocks) - 1, text))
        return out

    def _start(self, block: _Block) -> bytes:
        data = self._stop_block()
        self._blocks.append(block)
        start = {
            "type": "content_block_start",
            "index": len(self._blocks) - 1,
            "content_block": block.empty(),
        }
        return data + event(start, "content_block_start")

    def _delta(self, index: int, text: str) -> bytes:
        block = self._blocks[index]
        block.text += text
        delta = {"type": "content_block_delta", "index": index, "delta": block.delta(text)}
        return event(delta, "content_block_delta")

    def _stop_block(self) -> bytes:
        """The last block's end; none where there is no block."""
        if not self._blocks:
            return b""
        index, data = len(self._blocks) - 1, b""
        if self._blocks[index].kind == "thinking":  # clients keep thoughts by their signature
            delta = {"type": "signature_delta", "signature": ""}
            value = {"type": "content_block_delta", "index": index, "delta": delta}
            data = event(value, "content_block_delta")
        stop = {"type": "content_block_stop", "index": index}
        return data + event(stop, "content_block_stop")
