"""The prompts of DeepSeek-V3.2 and V4, which ship no chat template but a program in `encoding/`.

That program is never run; what it writes is written here. V4's checkpoints differ in how they tell
the model how much to think, which the program's text shows. A template that lies beside the
weights goes first (chat_template.py: ChatTemplate.from_dir).

Where V4's program and DeepSeek's own library for its prompts (deepseek-recipe) differ, the library
is followed: it opens every answer of the assistant, joins all system messages at the beginning,
keeps thoughts in the history only where there are tools, and writes nothing between the tags of a
call without arguments. Two things it does are not done here: calls are not sorted by their ids
(which are random), and the schemas of strict functions are shown as they are. Tasks are the
program's; the library has none.

Switches of `render`: thinking or enable_thinking (V4 thinks unless told not to, V3.2 only if told
to), reasoning_effort (V4), drop_thinking (false keeps all thoughts of the history). Messages may
have reasoning_content; V4's last user message may have a `task` (one of TASKS), and the role
latest_reminder is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.common.fields import shown
from jaxmoe.text import dsml
from jaxmoe.text.deepseek_texts import EFFORTS, EFFORTS_FIRST, TOOLS_V4, TOOLS_V32
from jaxmoe.text.tokenizer import read_json

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
REMINDER = "<\uff5clatest_reminder\uff5c>"
THINK, THINK_END = "<think>", "</think>"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
# Clients' words for V4's three levels, as DeepSeek's library takes them; "none" is no thinking.
_LEVELS = {"minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high"}
_LEVELS |= {"max": "max", "ultra": "max"}
_MAX_PROGRAM_BYTES = 1 << 20  # DeepSeek's have 30 KB


class MessageEncoding(Protocol):
    """What renders conversations in a template's place."""

    marks: str  # a text with the marks by which formats are chosen (output_parser.py)
    part_joint: str  # between the text parts of one content

    def render(self, variables: Mapping[str, Any]) -> str:
        """Variables as a template's: messages, tools, add_generation_prompt, response_format, and
        switches. RequestError for what cannot be said to the model.
        """
        ...


def message_encoding(path: Path) -> MessageEncoding | None:
    """The one of a checkpoint directory, by its program or its model_type."""
    program = path / "encoding" / "encoding_dsv4.py"
    if program.is_file():
        return DeepSeekV4Encoding(EFFORTS if "Beyond maximum" in _text(program) else EFFORTS_FIRST)
    if (path / "encoding" / "encoding_dsv32.py").is_file():
        return DeepSeekV32Encoding()
    model_type = read_json(path / "config.json").get("model_type")
    if model_type == "deepseek_v4":
        return DeepSeekV4Encoding()
    return DeepSeekV32Encoding() if model_type == "deepseek_v32" else None


class DeepSeekV4Encoding:
    """V4-Flash and V4-Pro. efforts: the text at the beginning of a prompt by level."""

    marks = THINK + THINK_END + ASSISTANT + dsml.opening(dsml.BLOCKS["deepseek_v4"])
    part_joint = "\n\n"

    def __init__(self, efforts: Mapping[str, str] = EFFORTS) -> None:
        self.efforts = efforts

    def render(self, variables: Mapping[str, Any]) -> str:
        thinking = _thinking(variables, default=True)
        level = _level(variables)
        tools = variables.get("tools") or ()
        keep = bool(tools) or variables.get("drop_thinking") is False
        system, turns = _turns(variables["messages"])
        out = [BOS, self.efforts[level] if thinking else "", "\n\n".join(system)]
        if tools:
            schemas = "\n".join(dsml.to_json(_function(t)) for t in tools)
            out.append("\n\n" + TOOLS_V4.replace("{tool_schemas}", schemas))
        out.append(_response_format(variables.get("response_format")))
        opened = THINK if thinking else THINK_END
        generate = variables["add_generation_prompt"]
        task = None  # of the turn before
        for at, turn in enumerate(turns):
            last = at == len(turns) - 1
            role = turn["role"]
            if role == "user":
                out.append(USER + "\n\n".join(turn["parts"]))
            elif role == "latest_reminder":
                out.append(REMINDER + turn["content"])
            else:
                # An answer that ends the prompt goes on, or is shown: its thoughts belong to it.
                shown_thoughts = thinking and (keep or (last and not generate))
                if task is None:
                    thoughts = turn["reasoning"] + THINK_END if shown_thoughts else ""
                    out.append(ASSISTANT + (THINK + thoughts if shown_thoughts else THINK_END))
                out.append(turn["content"] + _calls("deepseek_v4", turn["calls"]) + EOS)
            task = turn.get("task")
            if task is not None and (generate if last else turns[at + 1]["role"] != "user"):
                out.append(ASSISTANT + opened if task == "action" else "")
                out.append(f"<\uff5c{task}\uff5c>")
        if generate and task is None:
            out.append(ASSISTANT + opened)
        return "".join(out)


class DeepSeekV32Encoding:
    """V3.2 and V3.2-Speciale."""

    marks = THINK + THINK_END + ASSISTANT + dsml.opening(dsml.BLOCKS["deepseek_v32"])
    part_joint = ""

    def render(self, variables: Mapping[str, Any]) -> str:
        thinking = _thinking(variables, default=False)
        tools = variables.get("tools") or ()
        messages = list(variables["messages"])
        users = [i for i, m in enumerate(messages) if m["role"] in ("user", "developer")]
        last_user = users[-1] if users else -1
        if thinking and variables.get("drop_thinking") is not False:
            kept = ("user", "system", "tool", "assistant")
            dropped = [m for m in messages[:last_user] if m["role"] not in kept]
            messages = [m for m in messages[:last_user] if m["role"] in kept] + messages[last_user:]
            last_user -= len(dropped)
        if tools and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
            last_user += 1
        out, results, calls = [BOS], 0, 0
        for at, message in enumerate(messages):
            role, content = message["role"], message["content"] or ""
            if role != "tool":
                results = 0
            opened = THINK if thinking and at >= last_user else THINK_END
            if role == "system":
                out.append(content)
                if tools and at == 0:
                    schemas = "\n".join(dsml.to_json(t["function"]) for t in tools)
                    out.append("\n\n" + TOOLS_V32.replace("{tool_schemas}", schemas))
                out.append(_response_format(variables.get("response_format")) if at == 0 else "")
            elif role in ("user", "developer"):
                said = "\n\n# The user's message is: " if role == "developer" else ""
                out.append(USER + said + content)
                if variables["add_generation_prompt"] or at < len(messages) - 1:
                    out.append(ASSISTANT + opened)
            elif role == "assistant":
                if thinking and at > last_user:
                    out.append((message.get("reasoning_content") or "") + THINK_END)
                made = message.get("tool_calls") or ()
                calls = len(made)
                out.append(content + _calls("deepseek_v32", made) + EOS)
            elif role == "tool":
                results += 1
                if results > calls:
                    raise RequestError(
                        f"messages[{at}]: got a tool's result, wanted no more of them than the "
                        f"{calls} calls before"
                    )
                out.append("\n\n<function_results>" if results == 1 else "")
                out.append(f"\n<result>{content}</result>")
                if results == calls:
                    out.append("\n</function_results>\n\n" + opened)
            else:
                raise _unknown_role(at, role, "system, developer, user, assistant or tool")
        return "".join(out)


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The system's texts, and the turns: what a user and tools say one after the other is one."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    order: dict[str, int] = {}  # of the last calls, by id
    for at, message in enumerate(messages):
        role, content = message["role"], message["content"] or ""
        if role in ("system", "developer"):
            system += [content] if content else []
        elif role == "latest_reminder":
            turns.append({"role": role, "content": content})
        elif role == "assistant":
            calls = message.get("tool_calls") or ()
            order = {str(c.get("id")): i for i, c in enumerate(calls)} or order
            thoughts = message.get("reasoning_content") or ""
            turns.append({"role": role, "content": content, "reasoning": thoughts, "calls": calls})
        elif role in ("user", "tool"):
            if not turns or turns[-1]["role"] != "user" or turns[-1]["task"] is not None:
                turns.append({"role": "user", "parts": [], "results": [], "task": None})
            turn = turns[-1]
            if role == "tool":
                place = order.get(str(message.get("tool_call_id")), 0)
                turn["results"].append((place, f"<tool_result>{content}</tool_result>"))
                turn["parts"].append(None)  # its place: results are put in the calls' order below
            else:
                turn["task"] = _task(at, message.get("task"))
                turn["parts"] += [content] if content else []
        else:
            wanted = "system, developer, user, assistant, tool or latest_reminder"
            raise _unknown_role(at, role, wanted)
    for turn in turns:
        if turn["role"] == "user":
            results = iter(sorted(turn["results"], key=lambda r: r[0]))
            turn["parts"] = [next(results)[1] if p is None else p for p in turn["parts"]]
    return system, turns


def _task(at: int, task: Any) -> str | None:
    if task is not None and task not in TASKS:
        raise RequestError(
            f"messages[{at}].task: got {shown(task)}, wanted one of {', '.join(TASKS)}"
        )
    return task


def _calls(format: str, calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return ""
    block = dsml.BLOCKS[format]
    texts = []
    for call in calls:
        tags = dsml.parameters(call["function"]["arguments"])
        # V3.2's program leaves an empty line where there are no arguments.
        inner = "\n".join(tags) + ("\n" if tags or format == "deepseek_v32" else "")
        texts.append(dsml.invoke_head(call["function"]["name"]) + inner + dsml.closing("invoke"))
    return "\n\n" + "\n".join([dsml.opening(block), *texts, dsml.closing(block)])


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as V4 is shown it: these keys in this order."""
    function = tool["function"]
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {},
    }


def _response_format(format: Mapping[str, Any] | None) -> str:
    if format is None:
        return ""
    if format.get("schema") is None:
        return (
            "\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\n"
            "Reply with JSON object ONLY."
        )
    return (
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        + dsml.to_json(format["schema"])
    )


def _thinking(variables: Mapping[str, Any], *, default: bool) -> bool:
    told = []
    for name in ("thinking", "enable_thinking"):
        value = variables.get(name)
        if value is not None and not isinstance(value, bool):
            raise RequestError(f"{name}: got {shown(value)}, wanted true or false")
        told += [] if value is None else [value]
    if told:
        return all(told)
    return False if variables.get("reasoning_effort") == "none" else default


def _level(variables: Mapping[str, Any]) -> str:
    effort = variables.get("reasoning_effort")
    if effort is None or effort == "none":
        return "high"  # DeepSeek's library's, for requests that do not say
    if effort not in _LEVELS:
        raise RequestError(
            f"reasoning_effort: got {shown(effort)}, wanted none or one of {', '.join(_LEVELS)}"
        )
    return _LEVELS[effort]


def _unknown_role(at: int, role: str, wanted: str) -> RequestError:
    return RequestError(f"messages[{at}].role: got {shown(role)}, wanted {wanted}")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_PROGRAM_BYTES:
            raise CheckpointError(f"{path}: wanted at most {_MAX_PROGRAM_BYTES} bytes")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise CheckpointError(f"{path}: {e}") from None
