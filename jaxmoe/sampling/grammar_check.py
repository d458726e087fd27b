"""A grammar is tried in a process of its own before it may enter the one that serves.

llguidance bounds most of what a grammar can cost, not all: some take minutes, some gigabytes, and
deep recursion overflows the stack, which ends a process. The child compiles a grammar and computes
its first two masks, under limits of time, memory and stack that are tighter than the parent's;
where it does not survive that, it is killed and the request refused.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

from jaxmoe.common import limited_child
from jaxmoe.common.limited_child import LimitedChild

START_TIMEOUT_S = 60.0  # Python, the library and 150,000 tokens: about 2 s
CHECK_TIMEOUT_S = 5.0  # usual schemas take 10 ms
MEMORY_BYTES = 4 << 30  # address space; 150,000 tokens take 0.5 GB of it
STACK_BYTES = 2 << 20  # threads of the parent have 8 MiB
CPU_S = 10  # should the parent be gone


class GrammarChecker:
    """Owns the child. Thread-safe: one grammar is tried at a time.

    Args:
        describe: the vocabulary as `child` wants it; called when a child starts.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]]) -> None:
        code = "from jaxmoe.sampling.grammar_check import child; child()"
        self._child = LimitedChild(code, describe, START_TIMEOUT_S)

    def check(self, grammar: str) -> str | None:
        """What is wrong with a grammar in llguidance's form, or None. Raises CapacityError where
        the child cannot start.
        """
        try:
            return self._child.ask(grammar, CHECK_TIMEOUT_S)
        except TimeoutError:
            return f"did not compile within {CHECK_TIMEOUT_S:g} s; simplify it"
        except EOFError:
            return "takes too much memory or is nested too deeply; simplify it"

    def close(self) -> None:
        self._child.close()


def describe(
    tokens: Sequence[bytes], special_ids: Sequence[int], eos: Sequence[int], limits: dict[str, Any]
) -> dict[str, Any]:
    """The first message to a child."""
    return {
        "tokens": [base64.b85encode(t).decode() for t in tokens],
        "special": list(special_ids),
        "eos": list(eos),
        "limits": limits,
    }


def child() -> None:
    """The child: a vocabulary, then grammars for ever."""

    def begin(message: dict[str, Any]) -> Callable[[str], str | None]:
        import llguidance

        vocabulary = _Words(message)
        tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), eos_token=message["eos"]
        )
        limits = llguidance.LLParserLimits(**message["limits"])
        return lambda grammar: first_masks(tokenizer, grammar, limits, message["eos"])[1]

    limited_child.serve(begin, memory_bytes=MEMORY_BYTES, stack_bytes=STACK_BYTES, cpu_s=CPU_S)


def first_masks(tokenizer: Any, grammar: str, limits: Any, eos: Sequence[int]) -> tuple[Any, Any]:
    """Compiles a grammar and computes its first two masks, which show most of what is too complex.

    Returns:
        The matcher, at its beginning, and what is wrong, or None.
    """
    import llguidance

    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return matcher, in_short(matcher.get_error())
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    for token in eos:
        mask &= ~(1 << token)
    if matcher.is_error():
        return matcher, in_short(matcher.get_error())
    if not mask:
        return matcher, "no text of this model's tokens but the empty one matches"
    copy = matcher.deep_copy()
    copy.consume_token((mask & -mask).bit_length() - 1)
    copy.compute_bitmask()
    return matcher, in_short(copy.get_error()) if copy.is_error() else None


def in_short(message: str) -> str:
    """The library's message on one line, without its dump of the grammar."""
    words = " ".join(message.split()).replace(" <non-verbose/>", "")
    return (words if len(words) <= 300 else words[:297] + "...") or "the grammar is not usable"


class _Words:
    """A vocabulary that splits texts greedily; only the choice among spellings depends on it."""

    bos_token_id = None

    def __init__(self, message: dict[str, Any]) -> None:
        self.tokens = [base64.b85decode(t) for t in message["tokens"]]
        self.special_token_ids = message["special"]
        self.eos_token_id = message["eos"][0]
        special = set(self.special_token_ids)
        self._ids = {t: i for i, t in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        out, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if (token := self._ids.get(data[at:end])) is not None:
                    out.append(token)
                    break
            else:
                end = at + 1  # a byte that no token has
            at = end
        return out
