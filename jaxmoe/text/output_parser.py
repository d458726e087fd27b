"""From the text of a completion to the parts of a chat message: thoughts, content, tool calls.

`OutputFormats` says once for a checkpoint which formats its model speaks (from its chat template,
or as told); `parser` then makes one parser a completion. Requests whose text goes through a
parser need `SamplingParams(skip_special_tokens=False)`, for the tags may be special tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.common.errors import ConfigError
from jaxmoe.structured_output import StructuredOutput
from jaxmoe.text.reasoning import (
    ReasoningParser,
    choose_reasoning_format,
    opens_thoughts,
    reasoning_format,
)
from jaxmoe.text.tool_calls import (
    TOOL_FORMATS,
    ToolCallDelta,
    ToolCallParser,
    choose_tool_format,
    make_tool_parser,
    new_call_id,
)


@dataclasses.dataclass(frozen=True)
class MessageDelta:
    """What a piece of text added to a message."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


@dataclasses.dataclass(frozen=True)
class OutputFormats:
    """Names of reasoning.REASONING_FORMATS and tool_calls.TOOL_FORMATS; None: no such parts."""

    reasoning: str | None = None
    tools: str | None = None

    @classmethod
    def of(
        cls, template: str | None, *, reasoning: str = "auto", tools: str = "auto"
    ) -> OutputFormats:
        """The formats of a checkpoint with this chat template (`ChatTemplate.source`).

        reasoning, tools: "auto", "none", or a name. ConfigError for an unknown name.
        """
        if reasoning not in ("auto", "none"):
            reasoning_format(reasoning)
        if tools not in ("auto", "none", *TOOL_FORMATS):
            raise ConfigError(
                f"tool format: got {tools!r}, wanted auto, none or one of {', '.join(TOOL_FORMATS)}"
            )
        chosen = choose_reasoning_format(template) if reasoning == "auto" else reasoning
        tools_chosen = choose_tool_format(template) if tools == "auto" else tools
        return cls(
            None if chosen == "none" else chosen, None if tools_chosen == "none" else tools_chosen
        )

    def parser(
        self,
        prompt: str = "",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continued: str = "",
        split_reasoning: bool = True,
        make_id: Callable[[], str] = new_call_id,
    ) -> OutputParser:
        """A parser for one completion.

        Args:
            prompt: the rendered prompt; its end says whether the text begins inside thoughts.
            tools: the request's tools; none, and calls are content.
            continued: the unfinished assistant message at the prompt's end.
            split_reasoning: False leaves the thoughts in the content (reasoning_format "none").
        """
        thoughts = None
        if self.reasoning is not None and split_reasoning:
            format = reasoning_format(self.reasoning)
            thinking = opens_thoughts(prompt, format, continued)
            thoughts = ReasoningParser(format, thinking=thinking)
        calls = None
        if self.tools is not None and tools:
            calls = make_tool_parser(self.tools, tools, make_id)
        return OutputParser(thoughts, calls)

    def after_thoughts(
        self, structured: StructuredOutput, prompt: str, continued: str = ""
    ) -> StructuredOutput:
        """The same grammar, applied to the answer only: after thoughts that `prompt` opened or
        that the model may open itself.
        """
        if self.reasoning is None:
            return structured
        format = reasoning_format(self.reasoning)
        opened = opens_thoughts(prompt, format, continued)
        if not opened and (continued or prompt.rstrip().endswith(format.end)):
            return structured  # the prompt says that there are none, or that they are over
        return dataclasses.replace(
            structured, thoughts=(format.begin, format.end), begins_in_thoughts=opened
        )


class OutputParser:
    """One completion's text, piece by piece."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def thinking(self) -> bool:
        """Whether the text is inside the thoughts: tokens taken now count as reasoning tokens."""
        return self._reasoning is not None and self._reasoning.thinking

    @property
    def num_tool_calls(self) -> int:
        """Calls begun so far; with any, a finish_reason of "stop" is "tool_calls" to OpenAI."""
        return 0 if self._tools is None else self._tools.num_calls

    def feed(self, text: str) -> MessageDelta:
        """Takes the next piece; returns what became certain."""
        thoughts, answer = "", text
        if self._reasoning is not None:
            thoughts, answer = self._reasoning.feed(text)
        if self._tools is None:
            return MessageDelta(thoughts, answer)
        delta = self._tools.feed(answer)
        return MessageDelta(thoughts, delta.content, delta.calls)

    def finish(self) -> MessageDelta:
        """The rest. Call it once, after the last piece."""
        thoughts = answer = ""
        if self._reasoning is not None:
            thoughts, answer = self._reasoning.finish()
        if self._tools is None:
            return MessageDelta(thoughts, answer)
        first, last = self._tools.feed(answer), self._tools.finish()
        return MessageDelta(thoughts, first.content + last.content, _merged(first, last))


def _merged(first: Any, last: Any) -> tuple[ToolCallDelta, ...]:
    """The calls of two deltas as those of one."""
    calls = list(first.calls)
    for call in last.calls:
        if calls and calls[-1].index == call.index:
            joined = calls[-1].arguments + call.arguments
            calls[-1] = dataclasses.replace(calls[-1], arguments=joined)
        else:
            calls.append(call)
    return tuple(calls)
