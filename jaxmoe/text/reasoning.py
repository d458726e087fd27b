"""Thoughts apart from the answer, as the text is written: `<think>` ... `</think>`.

The families (from their model cards and chat templates):

* DeepSeek-R1 (0528 and the first): the template opens `<think>\\n` itself, so the text begins in
  the thoughts. DeepSeek-V3.1: the template writes `<think>` (thinking) or `</think>` (not);
  V3.2's and V4's prompts likewise.
* Qwen3: the model writes `<think>\\n...\\n</think>\\n\\n` itself; with enable_thinking=false the
  template writes an empty pair; the 2507 Thinking models' template opens `<think>\\n`.
* Kimi-K2-Thinking: the model writes `<think>...</think>`; a tool call may follow at once and ends
  the thoughts even where the closing tag was forgotten.

Some tokenizers mark these tags as special tokens: parse text that was written with
`SamplingParams(skip_special_tokens=False)`. What it does not do: tool calls (tool_calls.py).
"""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import ConfigError
from jaxmoe.text.dsml import BLOCKS, opening
from jaxmoe.text.tags import could_begin, first_of, unfinished


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """begin, end: the tags. ends_too: marks that end the thoughts and belong to the answer."""

    begin: str
    end: str
    ends_too: tuple[str, ...] = ()


_DEEPSEEK_TOOLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
_DSML_BLOCKS = tuple(opening(block) for block in BLOCKS.values())  # V3.2's and V4's
_KIMI_TOOLS = "<|tool_calls_section_begin|>"
REASONING_FORMATS = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", (_DEEPSEEK_TOOLS,)),
    "deepseek_v4": ReasoningFormat("<think>", "</think>", _DSML_BLOCKS),
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "kimi_k2": ReasoningFormat("<think>", "</think>", (_KIMI_TOOLS,)),
}


def choose_reasoning_format(template: str | None) -> str | None:
    """The name of the format that a checkpoint's chat template speaks; None where it knows no
    thoughts.
    """
    if template is None or ("</think>" not in template and "<think>" not in template):
        return None
    if any(mark in template for mark in _DSML_BLOCKS):
        return "deepseek_v4"
    if _DEEPSEEK_TOOLS in template or "<\uff5cAssistant\uff5c>" in template:
        return "deepseek_r1"
    return "kimi_k2" if _KIMI_TOOLS in template or "<|im_middle|>" in template else "qwen3"


def reasoning_format(name: str) -> ReasoningFormat:
    """A format by name; ConfigError for an unknown one."""
    if name not in REASONING_FORMATS:
        raise ConfigError(
            f"reasoning format: got {name!r}, wanted one of {', '.join(REASONING_FORMATS)}"
        )
    return REASONING_FORMATS[name]


def opens_thoughts(prompt: str, format: ReasoningFormat, continued: str = "") -> bool:
    """Whether a text written after `prompt` begins inside the thoughts.

    Args:
        prompt: the rendered prompt, which ends with `continued`.
        continued: the part of it that is an unfinished assistant message (continue_final_message).
    """
    head = prompt[: len(prompt) - len(continued)] if continued else prompt
    opened = head.rstrip().endswith(format.begin)
    begin, end = continued.rfind(format.begin), continued.rfind(format.end)
    return begin > end if begin >= 0 or end >= 0 else opened


class ReasoningParser:
    """Splits one completion's text.

    Newlines at both ends of the thoughts, and between them and the answer, are dropped (they
    belong to the format); everything else comes through unchanged, and no tag is ever given out
    in part.

    Args:
        thinking: whether the text begins inside the thoughts (see `opens_thoughts`).
    """

    def __init__(self, format: ReasoningFormat, *, thinking: bool = False) -> None:
        self._format = format
        self._held = ""
        self._opened_by_prompt = thinking
        # "begin": nothing but white space yet; then "thoughts", "gap" (after them), "answer".
        self._state = "begin"

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thought, as far as is known."""
        return self._state == "thoughts" or (self._state == "begin" and self._opened_by_prompt)

    def feed(self, text: str) -> tuple[str, str]:
        """Takes the next piece; returns what became certain of the (thoughts, answer)."""
        self._held += text
        return self._take(final=False)

    def finish(self) -> tuple[str, str]:
        """The rest, held back for a tag that did not come."""
        return self._take(final=True)

    def _take(self, final: bool) -> tuple[str, str]:
        thoughts = answer = ""
        if self._state == "begin" and not self._begin(final):
            return "", ""
        if self._state == "thoughts":
            thoughts = self._thoughts(final)
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            answer, self._held = self._held, ""
        return thoughts, answer

    def _begin(self, final: bool) -> bool:
        """Leaves the beginning once it is clear; False while it is not."""
        word = self._held.lstrip()
        begin = self._format.begin
        if word.startswith(begin):
            self._held = word[len(begin) :].lstrip("\n")
            # More newlines may follow in the next piece.
            if not self._held and not final:
                self._held = begin
                return False
        elif not final and could_begin(word, (begin,)):
            return False
        elif not self._opened_by_prompt:
            self._state = "answer"
            return True
        else:
            self._held = self._held.lstrip("\n")
        self._state = "thoughts"
        return True

    def _thoughts(self, final: bool) -> str:
        ends = (self._format.end, *self._format.ends_too)
        found = first_of(self._held, ends)
        if found is not None:
            at, tag = found
            given = self._held[:at].rstrip("\n")
            self._held = self._held[at + len(tag) if tag == self._format.end else at :]
            self._state = "gap"
            return given
        keep = len(self._held)
        if not final:
            keep -= unfinished(self._held, ends)
        given = self._held[:keep]
        trimmed = given.rstrip("\n")  # newlines before the end tag are not part of the thoughts
        self._held = "" if final else self._held[len(trimmed) :]
        return trimmed
