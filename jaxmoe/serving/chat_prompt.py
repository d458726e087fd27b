"""From a conversation to a prompt, whichever API it came by: template, tools, thinking, token ids.

Runs in a thread (see ServerState.off_loop). The three chat endpoints fill in a `ChatRequest` and
share everything from here to the engine and back to the parts of a message (chat_stream.py).
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.common.errors import RequestError
from jaxmoe.engine.async_engine import EngineInfo
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.errors import bad_field, renamed
from jaxmoe.serving.field_checks import OutputFormat, ToolChoice
from jaxmoe.serving.generation import Job
from jaxmoe.serving.state import ServerState
from jaxmoe.serving.structured import constraint
from jaxmoe.text.output_parser import OutputParser

AUTO = ToolChoice("auto")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A conversation and how to go on. sampling: what the body says of SamplingParams' fields.

    tools: in the chat form. thinking: True or False asks the template for it; None leaves it. max
    prompt: keep only the last so many tokens. names: what the client calls SamplingParams' fields.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = AUTO
    parallel_tool_calls: bool = True
    output_format: OutputFormat | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    thinking: bool | None = None
    effort: str | None = None
    split_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    truncate: int | None = None
    cache_salt: str | None = None
    messages_param: str = "messages"
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ChatJob:
    """A job, and what its completions' texts are parsed with."""

    job: Job
    request: ChatRequest
    state: ServerState
    prompt_text: str
    continued: str = ""

    def parser(self) -> OutputParser:
        """A parser for one completion."""
        request = self.request
        tools = request.tools if request.tool_choice.mode != "none" else ()
        return self.state.texts.formats.parser(
            self.prompt_text,
            tools=tools,
            continued=self.continued,
            split_reasoning=request.split_reasoning,
        )


def prepare(state: ServerState, info: EngineInfo, request: ChatRequest, request_id: str) -> ChatJob:
    """The prompt and its parameters. Raises RequestError and ApiError, naming the field."""
    _check_tools(state, request)
    text, continued = render(state, request)
    ids = state.encode(text, request.messages_param, info.max_model_len, special=False)
    if request.truncate is not None:
        ids = ids[-request.truncate :]
    given = dict(request.sampling)
    if state.texts.formats.reasoning is not None or request.tools:
        # The tags of thoughts and calls may be special tokens, and the parser has to see them.
        given.setdefault("skip_special_tokens", False)
    structured = constraint(state, request, text, continued)
    if structured is not None:
        given["structured"] = structured
    names = {**request.names, "prompt": request.messages_param}
    if structured is not None:  # the engine calls it by its kind
        format, forced = request.output_format, request.tool_choice.mode in ("required", "named")
        names[structured.kind] = "tools" if format is None or forced else format.param
    try:
        params = SamplingParams.of(given, info.default_params)
    except RequestError as e:
        raise renamed(e, names) from e
    job = Job(request_id, ids, params, text, request.cache_salt, names)
    return ChatJob(job, request, state, text, continued)


def render(state: ServerState, request: ChatRequest) -> tuple[str, str]:
    """The prompt's text, and the part of it that is an unfinished assistant message."""
    kwargs = dict(request.template_kwargs)
    if request.thinking is not None:
        for name in ("enable_thinking", "thinking"):  # Qwen3's and DeepSeek-V3.1's names for it
            kwargs.setdefault(name, request.thinking)
    if request.effort is not None:
        kwargs.setdefault("reasoning_effort", request.effort)
    offered = request.tools if request.tool_choice.mode != "none" else ()
    template = state.chat_template
    if not request.continue_final_message:
        text = template.render(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            tools=list(offered) or None,
            response_format=_response_format(request.output_format),
            **kwargs,
        )
        return text, ""
    final = request.messages[-1]
    content = final.get("content") or ""
    content = content.rstrip() if isinstance(content, str) else ""
    if final.get("role") != "assistant" or not content or final.get("tool_calls"):
        raise bad_field(
            "continue_final_message", "wants a last message of the assistant with text in it"
        )
    # Where the message ends cannot be told by its content: what the template puts after it may hold
    # the same characters. The mark is random, so that no content has it.
    mark = f"\ue000{secrets.token_hex(8)}\ue000"
    text = template.render(
        [*request.messages[:-1], {**final, "content": content + mark}],
        add_generation_prompt=False,
        tools=list(offered) or None,
        response_format=_response_format(request.output_format),
        **kwargs,
    )
    text = text.partition(mark)[0] if text.count(mark) == 1 else ""
    if not text.endswith(content):
        raise bad_field(
            "continue_final_message", "the chat template does not show the message as it is"
        )
    return text, content


def _response_format(format: OutputFormat | None) -> Mapping[str, Any] | None:
    """What the prompt may say of the answer's form."""
    if format is None or format.kind not in ("json_object", "json_schema"):
        return None
    return {"schema": format.value}


def _check_tools(state: ServerState, request: ChatRequest) -> None:
    choice, names = request.tool_choice, [t["function"]["name"] for t in request.tools]
    if choice.mode in ("required", "named") and not names:
        raise bad_field("tool_choice", "wants tools, and there are none")
    if choice.mode == "named" and choice.name not in names:
        raise bad_field("tool_choice", f"got {choice.name!r}, wanted one of {', '.join(names)}")
    if names and choice.mode != "none" and state.texts.formats.tools is None:
        raise RequestError(
            "tools: this model's chat template knows none; leave tools out, or set --tool_format"
        )
