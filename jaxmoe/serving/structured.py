"""What a body asks of the form of an answer, as the engine's constraint.

Two sources: a format for the content (response_format and its kin), and tools: a tool_choice that
forces calls, or one that leaves them to the model while functions are strict or only one may be
called. Thoughts are left free in all: the constraint begins after them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.common.errors import RequestError
from jaxmoe.serving.errors import bad_field, renamed
from jaxmoe.serving.field_checks import OutputFormat
from jaxmoe.structured_output import StructuredOutput
from jaxmoe.text.tool_grammar import free_grammar, tool_grammar

if TYPE_CHECKING:
    from jaxmoe.serving.chat_prompt import ChatRequest
    from jaxmoe.serving.state import ServerState


def constraint(
    state: ServerState, request: ChatRequest, prompt: str, continued: str
) -> StructuredOutput | None:
    """None where nothing is asked for. Raises ApiError 400 for what cannot be a grammar."""
    forced = _forced_calls(state, request)
    if forced is not None and request.output_format is not None:
        param = request.output_format.param
        raise bad_field(param, "not together with a tool_choice that forces calls")
    found = forced or plain_constraint(request.output_format) or _held_calls(state, request)
    if found is None or not request.split_reasoning:
        return found
    return state.texts.formats.after_thoughts(found, prompt, continued)


def plain_constraint(format: OutputFormat | None) -> StructuredOutput | None:
    if format is None:
        return None
    try:
        if format.kind == "json_object":
            return StructuredOutput.json_object()
        if format.kind == "json_schema":
            return StructuredOutput.json_schema(format.value)
        if format.kind == "choice":
            return StructuredOutput.choice(format.value)
        if format.kind == "regex":
            return StructuredOutput.regex(format.value)
        return StructuredOutput.grammar(format.value)
    except RequestError as e:
        raise renamed(e, {format.kind: format.param}) from None


def _forced_calls(state: ServerState, request: ChatRequest) -> StructuredOutput | None:
    choice, format = request.tool_choice, state.texts.formats.tools
    if choice.mode not in ("required", "named") or format is None:
        return None
    named = {"type": "function", "function": {"name": choice.name}}
    parallel = request.parallel_tool_calls and choice.parallel is not False
    return tool_grammar(
        format,
        request.tools,
        named if choice.mode == "named" else "required",
        state.tokenizer.token_id,
        parallel=parallel,
    )


def _held_calls(state: ServerState, request: ChatRequest) -> StructuredOutput | None:
    """For calls that the model makes by itself."""
    choice, format = request.tool_choice, state.texts.formats.tools
    if choice.mode != "auto" or format is None or not request.tools:
        return None
    parallel = request.parallel_tool_calls and choice.parallel is not False
    return free_grammar(format, request.tools, state.tokenizer.token_id, parallel=parallel)
