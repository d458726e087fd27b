"""From the engine's deltas to the parts of chat messages: thoughts, content, tool calls, ends."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator

from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.request import CompletionOutput, TokenLogprob
from jaxmoe.serving.chat_prompt import ChatJob
from jaxmoe.serving.generation import Generation
from jaxmoe.serving.state import ServerState
from jaxmoe.text.output_parser import MessageDelta, OutputParser
from jaxmoe.text.tool_calls import ToolCallDelta


@dataclasses.dataclass(frozen=True)
class Part:
    """What one step added to one choice. finish_reason: in OpenAI's words, on the last part.

    Logprobs are those of the step's tokens, whose text may come later: parsers and stop strings
    hold some back.
    """

    choice: int
    message: MessageDelta
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None


@dataclasses.dataclass
class Message:
    """A whole answer of one choice."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = dataclasses.field(default_factory=list)
    finish_reason: str = "stop"
    completion: CompletionOutput | None = None

    def add(self, part: Part) -> None:
        self.content += part.message.content
        self.reasoning += part.message.reasoning
        for call in part.message.tool_calls:
            add_call(self.calls, call)
        self.finish_reason = part.finish_reason or self.finish_reason


def add_call(calls: list[ToolCallDelta], delta: ToolCallDelta) -> None:
    """Joins a call's parts."""
    if delta.index == len(calls):
        calls.append(delta)
    else:
        known = calls[delta.index]
        joined = known.arguments + delta.arguments
        calls[delta.index] = dataclasses.replace(known, arguments=joined)


class ChatStream:
    """One conversation's answer, n choices of it."""

    def __init__(self, state: ServerState, job: ChatJob) -> None:
        self.job = job
        self.generation = Generation(state.engine, state.metrics, [job.job])
        self._parsers: dict[int, OutputParser] = {}

    @property
    def usage(self):
        return self.generation.usage

    async def parts(self) -> AsyncGenerator[Part | PrefillProgress]:
        """Parts as they become certain; steps that add nothing to see are left out, but for
        the tokens they bring (token ids, logprobs).
        """
        async with contextlib.aclosing(self.generation.steps()) as steps:
            async for step in steps:
                if isinstance(step, PrefillProgress):
                    yield step
                    continue
                delta, parser = step.delta, self._parser(step.choice)
                message = parser.feed(delta.text)
                # Of the tokens of a step, those before the thoughts' end are thoughts.
                if parser.thinking or (message.reasoning and not message.content):
                    self.usage.reasoning_tokens += len(delta.token_ids)
                reason: str | None = delta.finish_reason
                if reason is not None:
                    message = _joined(message, parser.finish())
                    if reason == "stop" and parser.num_tool_calls:
                        reason = "tool_calls"
                yield Part(step.choice, message, delta.token_ids, delta.logprobs, reason)

    async def finish(self) -> list[Message]:
        """Everything at once: the messages by choice."""
        messages = [Message() for _ in range(self.generation.num_choices)]
        async with contextlib.aclosing(self.parts()) as parts:
            async for part in parts:
                if isinstance(part, Part):
                    messages[part.choice].add(part)
        (output,) = self.generation.outputs
        if output is not None:
            for message, completion in zip(messages, output.outputs, strict=True):
                message.completion = completion
        return messages

    def _parser(self, choice: int) -> OutputParser:
        if choice not in self._parsers:
            self._parsers[choice] = self.job.parser()
        return self._parsers[choice]


def _joined(first: MessageDelta, last: MessageDelta) -> MessageDelta:
    calls = list(first.tool_calls)
    for call in last.tool_calls:
        if calls and calls[-1].index == call.index:
            joined = calls[-1].arguments + call.arguments
            calls[-1] = dataclasses.replace(calls[-1], arguments=joined)
        else:
            calls.append(call)
    return MessageDelta(
        first.reasoning + last.reasoning, first.content + last.content, tuple(calls)
    )
