"""Tool calls as tags with plain values: Qwen3-Coder (its chat template and model card)::

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are raw text; the tool's JSON schema says which are strings (parameters it does not know
are). Strings are given out while they are written (they can be whole files); other values when
they are complete. The opening `<tool_call>` is sometimes forgotten; a `<function=` of a known tool
is enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe.text.tags import could_begin, first_of, unfinished
from jaxmoe.text.tool_calls import MAX_HEAD_CHARS, ToolCallParser

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class QwenCoderParser(ToolCallParser):
    """See the module's docstring."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], make_id: Callable[[], str]) -> None:
        super().__init__(make_id)
        self._types = {name: parameter_types(f) for name, f in functions(tools).items()}
        self._name = self._key = ""
        self._first = True  # no parameter yet
        self._begun = False  # the first character of the value was seen
        self._raw = ""
        self._state = self._text

    def _step(self) -> bool:
        return self._state()

    def _end(self) -> None:
        if self._state in (self._text, self._function):
            self._add_content(self._raw + self._buf)
        elif self._state == self._string:
            self._add_arguments(escaped(self._buf))
        # Half a number would read as a whole one: a value that is no string stays away.
        elif self._state == self._closing and not could_begin(self._buf.strip(), (END,)):
            self._add_content(self._buf)
        self._buf = self._raw = ""

    def _text(self) -> bool:
        bare = [f"{FUNCTION}{name}>" for name in self._types]
        found = first_of(self._buf, (BEGIN, *bare))
        if found is None:
            held = unfinished(self._buf, (BEGIN, *bare))
            self._add_content(self._cut(len(self._buf) - held))
            return False
        self._add_content(self._cut(found[0]))
        self._raw = self._cut(len(BEGIN)) if found[1] == BEGIN else ""
        self._state = self._function
        return True

    def _function(self) -> bool:
        """After `<tool_call>`, up to the end of `<function=NAME>`."""
        word = self._buf.lstrip()
        if not word.startswith(FUNCTION):
            return not could_begin(word, (FUNCTION,)) and self._give_up()
        name, closed, rest = word[len(FUNCTION) :].partition(">")
        if not closed and len(name) <= MAX_HEAD_CHARS and "\n" not in name:
            return False
        if not closed or not name.strip() or len(name) > MAX_HEAD_CHARS or "\n" in name:
            return self._give_up()
        self._buf, self._raw = rest, ""
        self._name, self._first = name.strip(), True
        self._start_call(self._name)
        self._state = self._parameters
        return True

    def _parameters(self) -> bool:
        """Between the parameters of a function."""
        word = self._buf.lstrip()
        key, closed, rest = word[len(PARAMETER) :].partition(">")
        if word.startswith(PARAMETER) and len(key) <= MAX_HEAD_CHARS and "\n" not in key:
            if not closed:
                return False
            self._key, self._buf = key.strip(), rest
            self._add_arguments(("{" if self._first else ", ") + dumps(self._key) + ": ")
            self._first = False
            if self._types_of_key() == {"string"}:
                self._add_arguments('"')
                self._begun = False
                self._state = self._string
            else:
                self._state = self._other
            return True
        ends = (FUNCTION_END, END)
        if could_begin(word, (PARAMETER, *ends)) and word not in ends:
            return False
        self._add_arguments("{}" if self._first else "}")
        self._buf = word
        if word.startswith(FUNCTION_END):
            self._cut(len(FUNCTION_END))
        self._state = self._closing
        return True

    def _string(self) -> bool:
        """Inside a string value; one newline at either end belongs to the format."""
        if not self._begun and self._buf:
            self._buf = self._buf.removeprefix("\n")
            self._begun = True
        end = self._buf.find(PARAMETER_END)
        if end >= 0:
            self._add_arguments(escaped(self._cut(end).removesuffix("\n")) + '"')
            self._cut(len(PARAMETER_END))
            self._state = self._parameters
            return True
        held = unfinished(self._buf, ("\n" + PARAMETER_END, PARAMETER_END))
        self._add_arguments(escaped(self._cut(len(self._buf) - held)))
        return False

    def _other(self) -> bool:
        end = self._buf.find(PARAMETER_END)
        if end < 0:
            return False
        value = self._cut(end).removeprefix("\n").removesuffix("\n")
        self._cut(len(PARAMETER_END))
        self._add_arguments(typed(value, self._types_of_key()))
        self._state = self._parameters
        return True

    def _closing(self) -> bool:
        word = self._buf.lstrip()
        if could_begin(word, (END,)) and word != END:
            return False
        if word.startswith(END):
            self._buf = word[len(END) :]
        self._state = self._text
        return True

    def _give_up(self) -> bool:
        self._add_content(self._raw)
        self._raw = ""
        self._state = self._text
        return True

    def _types_of_key(self) -> set[str]:
        return self._types.get(self._name, {}).get(self._key, {"string"})


def functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The functions of an OpenAI tools list by name; entries of other forms are left out."""
    out = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            out[function["name"]] = function
    return out


def parameter_types(function: Mapping[str, Any]) -> dict[str, set[str]]:
    """JSON types that each parameter may have; an empty set where the schema does not say."""
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {str(key): _types(value) for key, value in properties.items()}


def _types(schema: Any, depth: int = 0) -> set[str]:
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, (list, tuple)):
        return {k for k in kind if isinstance(k, str)}
    if isinstance(schema.get("enum"), (list, tuple)):
        return {_type_of(v) for v in schema["enum"]}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), (list, tuple)):
            kinds = [_types(s, depth + 1) for s in schema[key]]
            return set().union(*kinds) if all(kinds) else set()
    return set()


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")):
        if isinstance(value, kind):
            return name
    return "object" if isinstance(value, Mapping) else "array"


def typed(text: str, types: set[str]) -> str:
    """JSON text of a raw value: as a type the schema allows, else as whatever it is, else a
    string.
    """
    text = text.strip()
    lowered = {"true": "true", "false": "false", "null": "null", "none": "null"}
    try:
        value = json.loads(lowered.get(text.lower(), text), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return dumps(text)
    kind = _type_of(value)
    allowed = not types or kind in types or (kind == "integer" and "number" in types)
    if not allowed and "string" in types:
        return dumps(text)
    return dumps(value)


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def escaped(text: str) -> str:
    """The inside of a JSON string."""
    return dumps(text)[1:-1]
