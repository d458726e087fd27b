"""What a text must look like: the specification of a grammar, as plain data.

It crosses process borders as JSON and is the key of the cache of compiled grammars, so it is
frozen, hashable and holds text only. What is checked here is what needs no tokenizer: form, size
and depth. What it does not do: compile (sampling/grammar.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

# A schema of an OpenAI request has at most 5,000 properties and 120,000 characters of names; twice
# that holds descriptions too. Depth: OpenAI allows 10, JSON libraries recurse.
MAX_CHARS = 256_000
MAX_DEPTH = 64
MAX_REGEX_CHARS = 16_384
MAX_CHOICES = 4096
MAX_TAG_CHARS = 64
# Models write JSON with a blank after colons and commas, or without; free white space would let a
# bad one write blanks for ever.
JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """Immutable and validated: RequestError says what is wrong. Make one with the class methods.

    kind, value: json_object (no value), json_schema (its JSON text), regex (of the whole text),
    choice (JSON list of texts), grammar (in Lark's syntax, as llguidance extends it).
    thoughts: opening and closing tag of thoughts that may come before the constrained text.
    begins_in_thoughts: the prompt opened them, so only their closing tag begins the constraint.
    """

    kind: Kind
    value: str = ""
    thoughts: tuple[str, str] | None = None
    begins_in_thoughts: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError(
                f"structured output: got kind {shown(self.kind)}, wanted one of "
                + ", ".join(get_args(Kind))
            )
        if not isinstance(self.value, str) or not isinstance(self.begins_in_thoughts, bool):
            raise RequestError(f"structured output: got {shown(self.value)}, wanted text")
        limit = MAX_REGEX_CHARS if self.kind == "regex" else MAX_CHARS
        if len(self.value) > limit:
            raise RequestError(
                f"{self.kind}: got {len(self.value)} characters, wanted at most {limit}"
            )
        try:
            self.value.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{self.kind}: holds a lone surrogate, wanted Unicode") from None
        if self.kind == "json_object":
            object.__setattr__(self, "value", "")
        elif not self.value:
            raise RequestError(f"{self.kind}: is empty")
        if self.kind == "json_schema":
            _check_schema(_loads(self.kind, self.value))
        elif self.kind == "choice":
            _check_choices(_loads(self.kind, self.value))
        if self.thoughts is not None:
            tags = tuple(self.thoughts)
            if len(tags) != 2 or not all(
                isinstance(t, str) and 0 < len(t) <= MAX_TAG_CHARS for t in tags
            ):
                raise RequestError(f"thoughts: got {shown(self.thoughts)}, wanted two tags")
            object.__setattr__(self, "thoughts", tags)
        elif self.begins_in_thoughts:
            raise RequestError("begins_in_thoughts: needs the tags in thoughts")

    @classmethod
    def json_object(cls) -> StructuredOutput:
        """Any JSON object."""
        return cls(kind="json_object")

    @classmethod
    def json_schema(cls, schema: Any) -> StructuredOutput:
        """JSON under a schema (an object, or true). Properties come in the schema's order."""
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise RequestError(f"json_schema: got {shown(schema)}, wanted an object")
        _check_depth("json_schema", schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as e:
            raise RequestError(f"json_schema: is no JSON: {e}") from None
        return cls(kind="json_schema", value=text)

    @classmethod
    def regex(cls, pattern: Any) -> StructuredOutput:
        """Text that matches as a whole; syntax of Rust's regex crate, without look-around."""
        if not isinstance(pattern, str):
            raise RequestError(f"regex: got {shown(pattern)}, wanted text")
        return cls(kind="regex", value=pattern)

    @classmethod
    def choice(cls, choices: Any) -> StructuredOutput:
        """One of some texts."""
        _check_choices(choices)
        return cls(kind="choice", value=json.dumps(list(choices), ensure_ascii=False))

    @classmethod
    def grammar(cls, lark: Any) -> StructuredOutput:
        """Text of a context-free grammar whose first rule is `start`."""
        if not isinstance(lark, str):
            raise RequestError(f"grammar: got {shown(lark)}, wanted text")
        return cls(kind="grammar", value=lark)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` takes them back."""
        out = dataclasses.asdict(self)
        out["thoughts"] = None if self.thoughts is None else list(self.thoughts)
        return out

    @classmethod
    def from_json(cls, value: Any) -> StructuredOutput:
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(value, Mapping) or not {"kind"} <= set(value) <= names:
            raise RequestError(f"structured output: got {shown(value)}, wanted {sorted(names)}")
        thoughts = value.get("thoughts")
        if isinstance(thoughts, list):
            thoughts = tuple(thoughts)
        return cls(**{**value, "thoughts": thoughts})


def lark_literal(text: str) -> str:
    """A text as a literal of a Lark grammar (its escapes are not quite JSON's)."""
    short = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}

    def escaped(char: str) -> str:
        if char in short:
            return short[char]
        return f"\\x{ord(char):02x}" if char < " " or char == "\x7f" else char

    return '"' + "".join(map(escaped, text)) + '"'


def _loads(kind: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{kind}: is no JSON: {str(e)[:200]}") from None


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, dict):
        raise RequestError(f"json_schema: got {shown(schema)}, wanted an object")
    _check_depth("json_schema", schema)


def _check_depth(name: str, value: Any) -> None:
    """Without recursion, for what is checked may be too deep for it."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise RequestError(f"{name}: is nested deeper than {MAX_DEPTH} levels; flatten it")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner.extend(item.values())
            elif isinstance(item, (list, tuple)):
                inner.extend(item)
        level, depth = inner, depth + 1


def _check_choices(choices: Any) -> None:
    if isinstance(choices, (str, bytes, Mapping)) or not isinstance(choices, Sequence):
        raise RequestError(f"choice: got {shown(choices)}, wanted a list of texts")
    if not 0 < len(choices) <= MAX_CHOICES:
        raise RequestError(f"choice: got {len(choices)} texts, wanted 1 to {MAX_CHOICES}")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise RequestError(f"choice: got {shown(choice)}, wanted texts that are not empty")
