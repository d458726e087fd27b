"""Conversations to prompts through the checkpoint's own Jinja template, as Hugging Face tokenizers
render it.

The template comes with the checkpoint and is compiled once, in a sandbox in which it can neither
reach attributes of Python objects nor change its arguments. Messages come from anybody, so they are
checked first and the rendered text is capped; repetition and powers are capped too, for they make
gigabytes of few characters. Servers render in processes of their own (template_process.py), which
bound time and memory whatever the template does. DeepSeek-V3.2 and V4 ship none: their prompts are
written natively (deepseek_encoding.py). What it does not do: take templates from requests.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.common.fields import shown
from jaxmoe.text.deepseek_encoding import MessageEncoding, message_encoding
from jaxmoe.text.template_process import TemplateProcess
from jaxmoe.text.tokenizer import check_text, read_json, token_text
from jaxmoe.text.tools import (
    PROBE,
    PROBE_KEY,
    PROBE_VALUE,
    ArgumentsForm,
    check_tool_calls,
    check_tools,
    in_form,
)

MAX_CHARS = 16 << 20
MAX_MESSAGES = 100_000
# What templates are given by the server, or call; no switch of a request may stand in for it.
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "response_format"),
        *("bos_token", "eos_token", "raise_exception", "strftime_now"),
    }
)


class CompiledTemplate:
    """A template in the sandbox, for plain variables."""

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise CheckpointError(f"chat template: {_words(e)}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises RequestError where the template refuses them."""
        pieces, length = [], 0
        try:
            for piece in self._template.generate(dict(variables)):
                length += len(piece)
                if length > MAX_CHARS:
                    raise RequestError(
                        f"the chat template wrote more than {MAX_CHARS} characters; send less text"
                    )
                pieces.append(piece)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as e:
            raise RequestError(f"the chat template refused the messages: {_words(e)}") from None
        except (RecursionError, MemoryError):
            raise RequestError("the messages are nested too deeply for the chat template") from None
        return "".join(pieces)


class ChatTemplate:
    """A compiled template and the special tokens it may name, or an encoding in its place.

    source: the template, of an encoding its marks; it says which formats the model speaks.
    """

    def __init__(
        self, source: str | MessageEncoding, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._renderer: CompiledTemplate | TemplateProcess | MessageEncoding
        if isinstance(source, str):
            self._renderer, self.source, self._part_joint = CompiledTemplate(source), source, ""
        else:
            self._renderer = source
            self.source, self._part_joint = source.marks, source.part_joint
        self._special_tokens = dict(special_tokens or {})

    def guarded(self) -> ChatTemplate:
        """The same template, rendered in processes of its own with limits of time and memory
        (template_process.py); `close` ends them. An encoding, whose time grows with the text alone,
        needs none.
        """
        if not isinstance(self._renderer, (CompiledTemplate, TemplateProcess)):
            return self
        guarded = ChatTemplate(self.source, self._special_tokens)
        guarded._renderer = TemplateProcess(self.source)
        return guarded

    def start(self) -> None:
        """Starts the processes, where there are any, before they are needed; CapacityError."""
        if isinstance(self._renderer, TemplateProcess):
            self._renderer.start()

    def close(self) -> None:
        if isinstance(self._renderer, TemplateProcess):
            self._renderer.close()

    @classmethod
    def from_dir(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a checkpoint directory: chat_template.jinja, else tokenizer_config.json,
        else an encoding that we know its family to have; None if none.

        A list of named templates gives its "default".
        """
        path = Path(path)
        config = read_json(path / "tokenizer_config.json")
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        file = path / "chat_template.jinja"
        if file.is_file():
            try:
                source = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise CheckpointError(f"{file}: not UTF-8: {e}") from None
        elif source is None:
            source = read_json(path / "chat_template.json").get("chat_template")
        if source is None:
            encoding = message_encoding(path)
            return None if encoding is None else cls(encoding)
        if not isinstance(source, str):
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: chat_template is {shown(source)}, wanted text"
            )
        special = {k: t for k, v in config.items() if k.endswith("_token") and (t := token_text(v))}
        try:
            return cls(source, special)
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        response_format: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation.

        Args:
            tools: OpenAI's list, or None.
            response_format: {"schema": a JSON schema, or None for any JSON object}, which the
                answer will be held to; encodings tell the model, templates have no words for it.
            kwargs: the template's own switches (such as enable_thinking).
        """
        if not isinstance(add_generation_prompt, bool):
            raise RequestError(
                f"add_generation_prompt: got {shown(add_generation_prompt)}, wanted true or false"
            )
        for name, value in kwargs.items():
            if name in RESERVED or not isinstance(value, (bool, int, float, str, type(None))):
                raise RequestError(
                    f"chat template argument {name!r}: got {shown(value)}, wanted a plain value "
                    "under a name that is not " + ", ".join(sorted(RESERVED))
                )
        checked = check_messages(messages, self._part_joint)
        if any(m.get("tool_calls") for m in checked):
            checked = in_form(checked, self._arguments_form)
        return self._render(
            {
                **self._special_tokens,
                **kwargs,
                "messages": checked,
                "tools": check_tools(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **({} if response_format is None else {"response_format": response_format}),
            }
        )

    @functools.cached_property
    def _arguments_form(self) -> ArgumentsForm:
        if not isinstance(self._renderer, (CompiledTemplate, TemplateProcess)):
            return "object"
        variables = {**self._special_tokens, "tools": None, "documents": None}
        variables |= {"add_generation_prompt": False, "messages": PROBE}
        try:
            text = self._render(variables)
        except RequestError:
            return "text"
        # Glued to text, an object shows as Python prints it.
        return "object" if PROBE_VALUE in text and f"'{PROBE_KEY}'" not in text else "text"

    def _render(self, variables: Mapping[str, Any]) -> str:
        return self._renderer.render(variables)


def check_messages(messages: Any, part_joint: str = "") -> list[dict[str, Any]]:
    """Plain copies of the messages, with lists of text parts joined to one text."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages: got {shown(messages)}, wanted a list of messages")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages: got {len(messages)}, wanted 1 to {MAX_MESSAGES}")
    return [_check_message(i, m, part_joint) for i, m in enumerate(messages)]


def _check_message(at: int, message: Any, part_joint: str) -> dict[str, Any]:
    name = f"messages[{at}]"
    if not isinstance(message, Mapping) or any(not isinstance(k, str) for k in message):
        raise RequestError(f"{name}: got {shown(message)}, wanted an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{name}.role: got {shown(role)}, wanted text such as 'user'")
    check_text(role, f"{name}.role")
    copy = dict(message)
    content = message.get("content")
    if copy.get("tool_calls") is not None:
        copy["tool_calls"] = check_tool_calls(f"{name}.tool_calls", copy["tool_calls"])
    if content is None and role == "assistant":
        copy["content"] = None  # templates ask whether it is none, not whether it is there
        return copy
    copy["content"] = _content_text(f"{name}.content", content, part_joint)
    return copy


def _content_text(name: str, content: Any, part_joint: str) -> str:
    if isinstance(content, (list, tuple)):
        texts = []
        for i, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise RequestError(f"{name}[{i}]: got {shown(part)}, wanted a part of type 'text'")
            check_text(part.get("text"), f"{name}[{i}].text")
            texts.append(part["text"])
        return part_joint.join(texts)
    check_text(content, name)
    return content


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys=False):
    """Unlike Jinja's own: no HTML escapes, non-ASCII text as it is, keys in the order given."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _words(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with operators that could make gigabytes capped as the output is."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    if len(text) * times > MAX_CHARS:
                        raise jinja2.TemplateError("a repetition is too long")
        elif operator == "**":
            if any(abs(x) > 10_000 for x in (left, right) if isinstance(x, (int, float))):
                raise jinja2.TemplateError("a power is too large")
        elif isinstance(left, str) and re.search(r"[0-9]{7}|\*", left):
            raise jinja2.TemplateError("a width in a % format is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is
    rendered as it is.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
