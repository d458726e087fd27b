"""One table of every request field: name, type, both bounds, default, aliases, endpoints.

Validation, the OpenAPI schema and the table in the docs are all made from it. The bounds of
sampling parameters are those of `SamplingParams`, which the engine checks once more at its border.
Fields that are not in the table are accepted and logged once; clients send many. What it does not
do: look inside messages and tools beyond their form (see field_checks.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxmoe.common.errors import JaxMoeError, RequestError
from jaxmoe.common.fields import Rule, check_value, rules
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving import field_checks as checks
from jaxmoe.serving.errors import ApiError, as_api_error, bad_field

_log = logging.getLogger(__name__)
Endpoint = Literal[
    "chat", "completions", "responses", "messages", "count_tokens", "tokenize", "detokenize"
]
ENDPOINTS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
Effect = Literal["used", "ignored", "refused"]


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of some endpoints' bodies.

    rule: type and bounds; for lists and objects ("other") the bounds are of their length. check:
    the form of what is "other", returning what handlers see. schema: its JSON schema, to which
    the bounds are added; texts in it are held to MAX_PROMPT_CHARS or a bound of its own. fills: the
    field of SamplingParams it sets. effect: "ignored" fields are checked and change nothing;
    "refused" ones must have a `harmless` value, which asks for nothing.
    """

    name: str
    on: tuple[Endpoint, ...]
    rule: Rule
    default: Any = None
    aliases: tuple[str, ...] = ()
    required: bool = False
    fills: str | None = None
    check: Callable[[str, Any], Any] | None = None
    schema: Mapping[str, Any] | None = None
    effect: Effect = "used"
    harmless: tuple[Any, ...] = ()

    @property
    def json_schema(self) -> dict[str, Any]:
        rule = self.rule
        schema: dict[str, Any]
        if self.schema is not None:
            schema = _with_lengths(self.schema, rule)
        elif rule.kind in ("int", "float"):
            schema = {"type": "integer" if rule.kind == "int" else "number"}
            if rule.low is not None:
                schema["exclusiveMinimum" if rule.low_open else "minimum"] = rule.low
            if rule.high is not None:
                schema["maximum"] = rule.high
        elif rule.kind == "bool":
            schema = {"type": "boolean"}
        elif rule.kind == "str":
            schema = {"type": "string"}
            if rule.choices:
                schema["enum"] = list(rule.choices)
            if rule.high is not None:
                schema["maxLength"] = int(rule.high)
        else:
            schema = {}
        if self.effect == "refused":
            schema = {"enum": [None, *(h for h in self.harmless if h is not None)]}
        elif not self.required and schema:
            schema = {"anyOf": [schema, {"type": "null"}]}
        schema["description"] = self.rule.help
        if self.default is not None:
            schema["default"] = self.default
        return schema


def _with_lengths(schema: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """The schema with the rule's bounds where it takes lists or objects; the tighter ones hold."""
    out = dict(schema)
    if "anyOf" in out:
        out["anyOf"] = [_with_lengths(s, rule) for s in out["anyOf"]]
    noun = {"array": "Items", "object": "Properties"}.get(out.get("type", ""))
    if noun is not None:
        if rule.low:
            out["min" + noun] = max(int(rule.low), out.get("min" + noun, 0))
        if rule.high is not None:
            out["max" + noun] = min(int(rule.high), out.get("max" + noun, int(rule.high)))
    return out


@dataclasses.dataclass(frozen=True)
class Body:
    """A checked body: known fields by name (aliases resolved, defaults filled in). given_as: the
    names that the client used, where those are aliases.
    """

    endpoint: Endpoint
    values: Mapping[str, Any]
    given_as: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def given(self, name: str) -> bool:
        return self.values.get(name) is not None

    def sampling(self) -> dict[str, Any]:
        """What the body says of SamplingParams' fields; what it does not say is left out."""
        out = {}
        for field in fields_of(self.endpoint):
            if field.fills is not None and self.values.get(field.name) is not None:
                out[field.fills] = self.values[field.name]
        return out

    def client_names(self) -> dict[str, str]:
        """What the client calls fields of SamplingParams, for errors of the engine."""
        fields = fields_of(self.endpoint)
        return {f.fills: self.given_as.get(f.name, f.name) for f in fields if f.fills is not None}


ALL_TEXT: tuple[Endpoint, ...] = ("chat", "completions", "responses", "messages")
OPENAI: tuple[Endpoint, ...] = ("chat", "completions")
CHATS: tuple[Endpoint, ...] = ("chat", "responses", "messages")
EVERY: tuple[Endpoint, ...] = tuple(ENDPOINTS)
_MAX_TEXT = checks.MAX_PROMPT_CHARS
_MAX_ENTRIES = 100_000  # messages or items; agents' longest conversations have some thousands
_MAX_OPTIONS = 64  # keys of an object of options; clients send more of them than are known here
_SAMPLING = rules(SamplingParams)


def _sampling(name: str, on: tuple[Endpoint, ...] = ALL_TEXT, **more: Any) -> Field:
    """A field that is SamplingParams' own. Null means not given, whatever the rule says."""
    return Field(name, on, _SAMPLING[name], fills=name, **more)


def _bool(name: str, on: tuple[Endpoint, ...], help: str, **more: Any) -> Field:
    return Field(name, on, Rule("bool", help), **more)


def _int(name: str, on: tuple[Endpoint, ...], help: str, low: int, high: int, **more: Any) -> Field:
    return Field(name, on, Rule("int", help, low=low, high=high), **more)


def _str(name: str, on: tuple[Endpoint, ...], help: str, high: int = 4096, **more: Any) -> Field:
    choices = more.pop("choices", ())
    rule = Rule("str", help, high=None if choices else high, choices=choices)
    return Field(name, on, rule, **more)


def _form(
    name: str,
    on: tuple[Endpoint, ...],
    help: str,
    form: checks.Form,
    low: int = 0,
    high: int = _MAX_OPTIONS,
    **more: Any,
) -> Field:
    rule = Rule("other", help, low=low, high=high)
    return Field(name, on, rule, check=form.check, schema=form.schema, **more)


def _ignored(name: str, on: tuple[Endpoint, ...], form: checks.Form | None = None) -> Field:
    help = "accepted; changes nothing here"
    if form is None:
        return _str(name, on, help, effect="ignored")
    return _form(name, on, help, form, effect="ignored")


def _refused(name: str, on: tuple[Endpoint, ...], help: str, *harmless: Any) -> Field:
    return Field(name, on, Rule("other", help), effect="refused", harmless=(None, *harmless))


TABLE: tuple[Field, ...] = (
    _str("model", EVERY, "name of the model; default: the one that is served", 1024),
    # What to answer.
    _form(
        "messages", ("chat",), "the conversation so far", checks.CHAT_MESSAGES, 1, _MAX_ENTRIES,
        required=True,
    ),
    _form(
        "messages", ("messages", "count_tokens"), "the conversation so far",
        checks.ANTHROPIC_MESSAGES, 1, _MAX_ENTRIES, required=True,
    ),
    _form("system", ("messages", "count_tokens"), "system prompt", checks.ANTHROPIC_SYSTEM, 0,
          _MAX_ENTRIES),
    _form("input", ("responses",), "a text, or items", checks.RESPONSES_INPUT, 1, _MAX_ENTRIES,
          required=True),
    _str("instructions", ("responses",), "system prompt", _MAX_TEXT),
    _form(
        "prompt", ("completions",), "a text, token ids, or a list of either", checks.PROMPT,
        1, checks.MAX_PROMPT_TOKENS, required=True,
    ),
    _form("messages", ("tokenize",), "a conversation, instead of prompt", checks.CHAT_MESSAGES, 1,
          _MAX_ENTRIES),
    _str("prompt", ("tokenize",), "text", _MAX_TEXT, aliases=("content",)),
    _form("tokens", ("detokenize",), "token ids", checks.TOKEN_IDS, 0,
          checks.MAX_PROMPT_TOKENS, required=True),
    _bool("add_special_tokens", ("tokenize", "completions"), "begin-of-text token where the model "
          "has one", default=True),
    _bool("return_token_strs", ("tokenize",), "also the tokens' texts", default=False),
    _bool("add_generation_prompt", ("chat", "tokenize"), "end the prompt where the assistant "
          "speaks", default=True),
    _bool("continue_final_message", ("chat", "tokenize"), "go on with the last message instead of "
          "answering it", default=False),
    _form("chat_template_kwargs", ("chat", "responses", "messages", "count_tokens", "tokenize"),
          "switches of the chat template, such as enable_thinking", checks.TEMPLATE_KWARGS, 0, 64),
    _str("reasoning_effort", ("chat",), "how much to think; none turns thinking off",
         choices=checks.EFFORTS),
    _form("reasoning", ("responses",), "effort, as reasoning_effort", checks.RESPONSES_REASONING),
    _form("thinking", ("messages", "count_tokens"), "whether to think; budget_tokens changes "
          "nothing here", checks.THINKING),
    _bool("include_reasoning", ("chat",), "give the thoughts in reasoning_content", default=True),
    _int("truncate_prompt_tokens", OPENAI, "keep only the last so many tokens of the prompt", 1,
         2**24),
    # Tools and forms.
    _form("tools", ("chat",), "functions the model may call", checks.CHAT_TOOLS, 0, 1024),
    _form("tools", ("responses",), "functions the model may call", checks.RESPONSES_TOOLS, 0, 1024),
    _form("tools", ("messages", "count_tokens"), "functions the model may call",
          checks.ANTHROPIC_TOOLS, 0, 1024),
    _form("tool_choice", ("chat",), "auto, none, required, or a function", checks.CHAT_TOOL_CHOICE),
    _form("tool_choice", ("responses",), "auto, none, required, or a function",
          checks.RESPONSES_TOOL_CHOICE),
    _form("tool_choice", ("messages", "count_tokens"), "auto, any, none, or a tool",
          checks.ANTHROPIC_TOOL_CHOICE),
    _bool("parallel_tool_calls", ("chat", "responses"), "several calls in one answer",
          default=True),
    _form("response_format", OPENAI, "text, json_object or json_schema", checks.RESPONSE_FORMAT),
    _form("text", ("responses",), "format: text, json_object or json_schema", checks.TEXT_FORMAT),
    _form("output_config", ("messages", "count_tokens"), "format: json_schema; effort, as "
          "reasoning_effort", checks.OUTPUT_CONFIG),
    _form("structured_outputs", OPENAI, "one of json, regex, choice, grammar, json_object",
          checks.STRUCTURED_OUTPUTS),
    # How long.
    _sampling("max_tokens", ("chat",), aliases=("max_completion_tokens",)),
    Field("max_tokens", ("completions",), dataclasses.replace(
        _SAMPLING["max_tokens"], low=0, help="longest completion; 0 only with echo"), default=16,
        fills="max_tokens"),
    _sampling("max_tokens", ("messages",), required=True),
    Field("max_output_tokens", ("responses",), _SAMPLING["max_tokens"], fills="max_tokens"),
    _sampling("min_tokens"),
    _sampling("ignore_eos"),
    _form("stop", OPENAI, f"up to {checks.MAX_STOPS} strings that end the text", checks.STOP, 0,
          checks.MAX_STOPS, fills="stop"),
    _form("stop_sequences", ("messages",), f"up to {checks.MAX_STOPS} strings that end the text",
          checks.STOP, 0, checks.MAX_STOPS, fills="stop"),
    _form("stop_token_ids", ALL_TEXT, "token ids that end the text", checks.TOKEN_IDS, 0, 128,
          fills="stop_token_ids"),
    _sampling("include_stop_str_in_output", OPENAI),
    _sampling("skip_special_tokens", OPENAI),
    # How tokens are chosen.
    _sampling("n", OPENAI),
    _sampling("temperature"),
    _sampling("top_p"),
    _sampling("top_k"),
    _sampling("min_p"),
    _sampling("seed"),
    _sampling("repetition_penalty"),
    _sampling("presence_penalty"),
    _sampling("frequency_penalty"),
    _form("logit_bias", OPENAI, "map of token id to a number from -100 to 100 added to its logit",
          checks.LOGIT_BIAS, 0, 1024, fills="logit_bias"),
    # What comes back.
    _bool("stream", ALL_TEXT, "send the answer as it is written", default=False),
    _form("stream_options", OPENAI, "include_usage, continuous_usage_stats", checks.STREAM_OPTIONS),
    _bool("logprobs", ("chat",), "log probabilities of the tokens", default=False),
    _int("top_logprobs", ("chat", "responses"), "of so many likeliest tokens at each position", 0,
         20),
    _sampling("logprobs", ("completions",)),
    _form("include", ("responses",), "message.output_text.logprobs asks for log probabilities; "
          "the others change nothing here", checks.INCLUDES, 0, checks.MAX_INCLUDES),
    _int("prompt_logprobs", OPENAI, "log probabilities of the prompt's tokens too; not in streams",
         0, 20),
    _bool("echo", ("completions",), "begin the text with the prompt", default=False),
    _bool("return_token_ids", OPENAI, "also the token ids of prompt and answer", default=False),
    _bool("return_progress", ("chat", "completions"), "in a stream, how much of the prompt is "
          "computed (a streamed one's layer too), and the time left", default=False),
    _bool("timings", OPENAI, "also how long things took", default=False),
    _str("cache_salt", ALL_TEXT, "share cached prefixes only with requests of the same salt", 256),
    # Of no effect here.
    _ignored("user", ALL_TEXT),
    _ignored("metadata", ALL_TEXT, checks.OBJECT),
    _ignored("store", CHATS, checks.BOOL),
    _ignored("service_tier", ALL_TEXT),
    _ignored("safety_identifier", ("chat", "responses")),
    _ignored("prompt_cache_key", ("chat", "responses")),
    _ignored("verbosity", ("chat",)),
    _ignored("truncation", ("responses",)),
    _ignored("stream_options", ("responses",), checks.OBJECT),
    _ignored("context_management", ("messages", "count_tokens"), checks.OBJECT),
    _ignored("cache_control", ("messages", "count_tokens"), checks.OBJECT),
    # Known, and not here.
    _refused("suffix", ("completions",), "text after the completion is not supported", ""),
    _refused("best_of", ("completions",), "is not supported; use n", 1),
    _refused("functions", ("chat",), "is the old form of tools; use tools", []),
    _refused("function_call", ("chat",), "is the old form of tool_choice; use that", "auto",
             "none"),
    _refused("audio", ("chat",), "only text is supported"),
    _refused("modalities", ("chat",), "only text is supported", ["text"]),
    _refused("prediction", ("chat",), "predicted outputs are not supported"),
    _refused("prompt_embeds", ("chat", "completions", "responses"), "prompts are texts or token "
             "ids, never tensors"),
    _refused("guided_json", OPENAI, "is the old form of structured_outputs; use that"),
    _refused("guided_regex", OPENAI, "is the old form of structured_outputs; use that"),
    _refused("guided_choice", OPENAI, "is the old form of structured_outputs; use that"),
    _refused("guided_grammar", OPENAI, "is the old form of structured_outputs; use that"),
    _refused("web_search_options", ("chat",), "this server makes no outgoing connection"),
    _refused("chat_template", ("chat", "tokenize"), "templates are taken from the checkpoint only"),
    _refused("previous_response_id", ("responses",), "responses are not stored; send the items"),
    _refused("conversation", ("responses",), "conversations are not stored; send the items"),
    _refused("background", ("responses",), "is not supported; use stream", False),
    _refused("prompt", ("responses",), "stored prompts are not supported; send instructions"),
    _refused("mcp_servers", ("messages",), "this server makes no outgoing connection", []),
    _refused("container", ("messages",), "is not supported"),
)  # fmt: skip


def fields_of(endpoint: Endpoint) -> tuple[Field, ...]:
    return _BY_ENDPOINT[endpoint]


_BY_ENDPOINT = {e: tuple(f for f in TABLE if e in f.on) for e in ENDPOINTS}
_BY_NAME = {
    e: {name: f for f in fields for name in (f.name, *f.aliases)}
    for e, fields in _BY_ENDPOINT.items()
}


class Checker:
    """Checks bodies; remembers which unknown fields it has logged."""

    MAX_LOGGED = 256  # a client that invents names must not fill memory or the log

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def check(self, endpoint: Endpoint, body: Any) -> Body:
        """The checked body; ApiError 400 naming the first field that is wrong."""
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        known = _BY_NAME[endpoint]
        values: dict[str, Any] = {}
        given_as: dict[str, str] = {}
        for name, value in body.items():
            field = known.get(name)
            if field is None:
                self._note_unknown(endpoint, name)
            elif value is None:
                continue  # as good as not given
            else:
                checked = check_field(field, name, value)
                if name != field.name and values.get(field.name, checked) != checked:
                    raise bad_field(name, f"got {checked!r}, but {field.name} says otherwise")
                values[field.name] = checked
                if name != field.name:
                    given_as[field.name] = name
        for field in fields_of(endpoint):
            if field.name in values:
                continue
            if field.required:
                raise ApiError(
                    400, f"{field.name}: missing; wanted {field.rule.help}", param=field.name,
                    code="missing_required_parameter",
                )  # fmt: skip
            values[field.name] = field.default
        return Body(endpoint, values, given_as)

    def _note_unknown(self, endpoint: Endpoint, name: str) -> None:
        key = (endpoint, name[:64])
        if key not in self._logged and len(self._logged) < self.MAX_LOGGED:
            self._logged.add(key)
            _log.warning("%s: unknown field %r is ignored (logged once)", ENDPOINTS[endpoint],
                         key[1])  # fmt: skip


def check_field(field: Field, name: str, value: Any) -> Any:
    """A field's value as handlers see it; ApiError 400 naming it by the `name` it came under."""
    if field.effect == "refused":
        if value not in field.harmless:
            raise bad_field(name, field.rule.help, "unsupported_parameter")
        return value
    try:
        if field.check is None:
            checked = check_value(name, value, field.rule, RequestError)
            most = field.rule.high if field.rule.kind == "str" else None
            if most is not None and len(checked) > most:
                raise bad_field(name, f"got {len(checked)} characters, wanted at most {most}")
            return checked
        if isinstance(value, (list, dict)):
            _check_length(name, value, field.rule)
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            raise bad_field(name, f"got {len(value)} characters, wanted at most {_MAX_TEXT}")
        return field.check(name, value)
    except JaxMoeError as e:
        finer = as_api_error(e)  # a check inside names the entry, as in messages[0].role
        if finer is not None and (finer.param or "").startswith(name):
            raise finer from None
        raise bad_field(name, str(e)) from None


def _check_length(name: str, value: Any, rule: Rule) -> None:
    low, high = rule.low, rule.high
    if (low is not None and len(value) < low) or (high is not None and len(value) > high):
        raise bad_field(name, f"got {len(value)} entries, wanted {low} to {high}")


def _in_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema's types and bounds; what is inside lists is left to OpenAPI."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_in_words(s) for s in schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(str(v) for v in schema["enum"] if v is not None)
    kinds = schema.get("type", ())
    kind = next((k for k in ([kinds] if isinstance(kinds, str) else kinds) if k != "null"), "any")
    if kind in ("integer", "number"):
        noun = "a whole number" if kind == "integer" else "a number"
        return f"{noun} from {schema['minimum']} to {schema['maximum']}"
    if kind == "boolean":
        return "true or false"
    noun, words = _LENGTHS[kind]
    low, high = schema.get("min" + noun), schema.get("max" + noun)
    text = words.format(f"{low} to {high}" if low else f"at most {high}")
    inner = "; ".join(f"`{n}` {_in_words(s)}" for n, s in schema.get("properties", {}).items())
    return f"{text} ({inner})" if inner else text


_LENGTHS = {
    "string": ("Length", "text of {} characters"),
    "array": ("Items", "a list of {}"),
    "object": ("Properties", "an object of {} keys"),
}


def docs_table() -> str:
    """The table of all fields, as Markdown."""
    lines = ["| field | endpoints | value | default | |", "|---|---|---|---|---|"]
    for f in TABLE:
        names = " / ".join(f"`{n}`" for n in (f.name, *f.aliases))
        on = "all" if f.on == EVERY else ", ".join(f.on)
        if f.effect == "refused":
            value = "refused"
        elif f.schema is not None:
            value = _in_words(_with_lengths(f.schema, f.rule))
        else:
            value = f.rule.wanted()
        if f.rule.kind == "str" and f.rule.high:
            value = f"text of at most {f.rule.high} characters"
        default = "required" if f.required else "" if f.default is None else f"`{f.default}`"
        lines.append(f"| {names} | {on} | {value} | {default} | {f.rule.help} |")
    return "\n".join(lines)
