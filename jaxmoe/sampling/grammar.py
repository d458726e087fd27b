"""Constrained decoding: which tokens may come next, under a `StructuredOutput`, by llguidance.

A grammar is compiled once (tried in a process of its own before, within limits of size, time and
memory: grammar_check.py) and kept in a bounded cache in memory; each sequence then walks its own
copy. A sequence's mask has one bit a token of the model, and enters the compiled step only while
the grammar applies (not in thoughts before it). Embedding rows beyond the tokenizer are always
masked, and so are special tokens that the grammar does not name.

Whatever goes wrong with a grammar ends its own request: at the door (RequestError), or, where it
shows only while decoding (a state too complex, masks that take too long), with finish_reason
"error". What it does not do: apply masks (logits.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import llguidance
import numpy as np

from jaxmoe.common.errors import RequestError
from jaxmoe.sampling.grammar_check import GrammarChecker, describe, first_masks, in_short
from jaxmoe.structured_output import JSON_OPTIONS, StructuredOutput, lark_literal

MAX_CACHED = 64  # grammars; usual ones take under 1 MB
MAX_CACHED_CHARS = 4 << 20
# CPU seconds a sequence may spend on masks: usual ones take 0.1 ms, up to a few ms with 150,000
# tokens. An ambiguous grammar takes 0.1 to 1 s a token, for all who share the engine.
MASK_BUDGET_S = 2.0
MASK_BUDGET_S_PER_TOKEN = 0.01
_LIMITS: dict[str, Any] = {
    "max_lexer_states": 50_000,  # 1 to 2 kB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_WORD = 32


class TokenizerLike(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int

    def token_bytes(self, token_id: int) -> bytes: ...
    def tag_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class GrammarCompiler:
    """Compiles and keeps the grammars of one tokenizer. Thread-safe.

    Args:
        token_bytes: what a token adds to a text; empty: never allowed.
        num_tokens: of the tokenizer.
        special_ids: tokens that are no text: only a grammar that names them allows them.
        eos_token_ids: allowed where a grammar may end.
        encode: the tokenizer, text to ids.
        vocab_size: of the model, the width of the masks.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        num_tokens: int,
        special_ids: Collection[int],
        eos_token_ids: Sequence[int],
        encode: Callable[[str], list[int]],
        vocab_size: int,
    ) -> None:
        self._make_vocabulary = lambda: _Vocabulary(
            [token_bytes(i) for i in range(min(num_tokens, vocab_size))],
            special_ids,
            eos_token_ids,
            encode,
            vocab_size,
        )
        self._made: _Vocabulary | None = None
        self._making = threading.Lock()
        self._lock = threading.Lock()
        self._cache: OrderedDict[StructuredOutput, llguidance.LLMatcher] = OrderedDict()
        self._cached_chars = 0
        self._checker = GrammarChecker(lambda: self._vocabulary.describe())

    @classmethod
    def of(
        cls, tokenizer: TokenizerLike, *, eos_token_ids: Sequence[int], vocab_size: int
    ) -> GrammarCompiler:
        """The compiler for a checkpoint's tokenizer (text/tokenizer.py)."""
        return cls(
            tokenizer.token_bytes,
            tokenizer.vocab_size,
            tokenizer.tag_ids(),
            eos_token_ids,
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            vocab_size,
        )

    def matcher(self, spec: StructuredOutput) -> SequenceGrammar:
        """A new sequence's grammar. Compiles on first use, which can take seconds; call `prepare`
        from another thread before, where that matters.

        Raises RequestError where the grammar is wrong, too large, or can only be empty.
        """
        compiled = self.prepare(spec)
        with self._lock:
            own = compiled.deep_copy()
        return SequenceGrammar(own, spec, self._vocabulary)

    def prepare(self, spec: StructuredOutput) -> llguidance.LLMatcher:
        """Compiles into the cache; the same errors."""
        key = StructuredOutput(kind=spec.kind, value=spec.value)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        compiled = self._compile(key)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = compiled
                self._cached_chars += len(key.value)
            while len(self._cache) > MAX_CACHED or (
                self._cached_chars > MAX_CACHED_CHARS and len(self._cache) > 1
            ):
                old, _ = self._cache.popitem(last=False)
                self._cached_chars -= len(old.value)
        return compiled

    @property
    def _vocabulary(self) -> _Vocabulary:
        """Made at first use: it takes a second for 128,000 tokens."""
        with self._making:
            if self._made is None:
                self._made = self._make_vocabulary()
            return self._made

    def close(self) -> None:
        """Ends the process that tries grammars."""
        self._checker.close()

    def _compile(self, spec: StructuredOutput) -> llguidance.LLMatcher:
        try:
            grammar = _grammar_text(spec)
        except ValueError as e:
            raise RequestError(f"{spec.kind}: {in_short(str(e))}") from None
        wrong = self._checker.check(grammar)
        if wrong is not None:
            raise RequestError(f"{spec.kind}: {wrong}")
        vocabulary = self._vocabulary
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher, wrong = first_masks(vocabulary.tokenizer, grammar, limits, vocabulary.eos)
        if wrong is not None:
            raise RequestError(f"{spec.kind}: {wrong}")
        return matcher


class _Vocabulary:
    """The tokens of a model as llguidance wants them."""

    def __init__(
        self,
        tokens: list[bytes],
        special_ids: Collection[int],
        eos_token_ids: Sequence[int],
        encode: Callable[[str], list[int]],
        vocab_size: int,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(i for i in eos_token_ids if i < vocab_size)
        tokens += [b""] * (max(self.eos_token_ids, default=-1) + 1 - len(tokens))
        eos = sorted(self.eos_token_ids)
        if not eos:
            # llguidance needs one. Its bit lies beyond the model's tokens, or is never set there.
            eos = [len(tokens)]
            tokens.append(b"")
        self.tokens = tokens
        self.special_token_ids = sorted({i for i in special_ids if i < len(tokens)} | set(eos))
        self.eos_token_id, self.bos_token_id = eos[0], None
        self.eos = eos
        self._encode = encode
        self._ids: dict[str, int | None] = {}
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self), eos_token=eos)
        self.num_words = -(-len(tokens) // _WORD)
        self._eos_words = self.words_of(eos)
        blank = {i for i, b in enumerate(tokens) if b and not b.strip(b"\n")}
        self.newlines = self.words_of(blank - set(self.special_token_ids))

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)

    def describe(self) -> dict[str, Any]:
        return describe(self.tokens, self.special_token_ids, self.eos, _LIMITS)

    def token_id(self, text: str) -> int | None:
        """The single token that is this text, the special one of two."""
        if text not in self._ids:
            found = [i for i, b in enumerate(self.tokens) if b == text.encode()]
            special = [i for i in found if i in self.special_token_ids]
            self._ids[text] = next(iter(special or found), None)
        return self._ids[text]

    def words_of(self, ids: Iterable[int]) -> np.ndarray:
        words = np.zeros(self.num_words, np.uint32)
        for i in ids:
            words[i // _WORD] |= np.uint32(1 << (i % _WORD))
        return words

    def mask_of(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        words = np.zeros(self.num_words, np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words

    def goes_on(self, words: np.ndarray) -> bool:
        """Whether a mask allows anything but the end."""
        return bool((words & ~self._eos_words).any())


class SequenceGrammar:
    """Where one sequence is in its grammar.

    complete: nothing more can follow; the text ends here. error: why the grammar failed, or None.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, spec: StructuredOutput, vocabulary: _Vocabulary
    ) -> None:
        self.complete = False
        self.error: str | None = None
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._used_s, self._allowed_s = 0.0, MASK_BUDGET_S
        # "start": thoughts may begin; "thoughts": free; "gap": after them; "on": constrained.
        self._state = "on"
        self._tail = b""
        self._begin: int | None = None
        if spec.thoughts is not None:
            begin, end = spec.thoughts
            self._end = end.encode()
            self._begin = vocabulary.token_id(begin)
            if spec.begins_in_thoughts:
                self._state = "thoughts"
            elif self._begin is not None:
                self._state = "start"
        self._mask = np.zeros(0, np.uint32)
        self._refresh()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._vocabulary.eos_token_ids

    @property
    def applies(self) -> bool:
        """Whether the next token is constrained."""
        return self._state != "thoughts"

    def mask(self, banned: Collection[int] = ()) -> np.ndarray | None:
        """`[ceil(V / 32)]` uint32, bit `i % 32` of word `i // 32` for token i; None while the
        grammar does not apply. Tokens of `banned` are left out unless nothing else may follow.
        """
        if not self.applies:
            return None
        vocabulary = self._vocabulary
        words = self._mask
        if self._state == "start" and self._begin is not None:
            words = words | vocabulary.words_of([self._begin])
        elif self._state == "gap":
            words = words | vocabulary.newlines
        if banned:
            inside = [i for i in banned if i < len(vocabulary.tokens)]
            left = words & ~vocabulary.words_of(inside)
            words = left if left.any() else words
        out = np.zeros(-(-vocabulary.vocab_size // _WORD), np.uint32)
        count = min(out.size, words.size)
        out[:count] = words[:count]
        return out

    def accept(self, token: int) -> None:
        """Takes the token that was drawn; sets `complete` or `error`."""
        if self.complete or self.error is not None:
            return
        vocabulary = self._vocabulary
        if self._state == "start" and token == self._begin:
            self._state = "thoughts"
        elif self._state == "thoughts":
            piece = vocabulary.tokens[token] if token < len(vocabulary.tokens) else b""
            self._tail += piece
            if self._end in self._tail:
                self._state = "gap"
            self._tail = self._tail[-len(self._end) :]
        elif self._state == "gap" and not _has(self._mask, token):
            self._state = "on"  # the newlines after the thoughts
        else:
            self._state = "on"
            self._allowed_s += MASK_BUDGET_S_PER_TOKEN
            if not self._timed(lambda: self._matcher.consume_token(token)):
                self.error = self.error or in_short(self._matcher.get_error())
                return
            if self._matcher.is_stopped() and not self._matcher.is_error():
                self.complete = True
                return
            self._refresh()

    def _refresh(self) -> None:
        """Computes the next mask; the grammar is complete where only the end may follow."""
        mask = self._timed(lambda: self._vocabulary.mask_of(self._matcher))
        if mask is None:
            return
        self._mask = mask
        if self._matcher.is_error():
            self.error = in_short(self._matcher.get_error())
        elif self._used_s > self._allowed_s:
            self.error = f"the grammar took {self._used_s:.1f} s of computing; simplify it"
        elif not self._vocabulary.goes_on(self._mask):
            self.complete = True

    def _timed(self, call: Callable[[], Any]) -> Any:
        """The call's result; None where the library failed, which then is the `error`."""
        # CPU time, so that a busy machine ends no request.
        start = time.thread_time()
        try:
            return call()
        except BaseException as e:
            # A panic of the library is no Exception, and still only this request's trouble.
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            self.error = f"{type(e).__name__}: {in_short(str(e))}"
            return None
        finally:
            self._used_s += time.thread_time() - start


def _grammar_text(spec: StructuredOutput) -> str:
    make = llguidance.LLMatcher
    if spec.kind == "json_object":
        return make.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)
    if spec.kind == "json_schema":
        return make.grammar_from_json_schema(spec.value, overrides=JSON_OPTIONS)
    if spec.kind == "regex":
        return make.grammar_from_regex(_without_anchors(spec.value))
    if spec.kind == "choice":
        choices = sorted(set(json.loads(spec.value)))
        # One terminal: as rules, thousands would be parsed side by side.
        terminal = " | ".join(map(lark_literal, choices))
        return make.grammar_from_lark(f"start: CHOICE\nCHOICE: {terminal}")
    return make.grammar_from_lark(spec.value)


def _without_anchors(pattern: str) -> str:
    """The whole text must match anyway; `^` and `$` around the whole are dropped, since llguidance
    knows none.
    """
    if _alternatives_outside(pattern):
        return pattern
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$"):
        slashes = len(pattern[:-1]) - len(pattern[:-1].rstrip("\\"))
        if slashes % 2 == 0:
            return pattern[:-1]
    return pattern


def _alternatives_outside(pattern: str) -> bool:
    """Whether a `|` stands outside of groups, classes and escapes."""
    depth, in_class, escaped = 0, False, False
    for char in pattern:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
        elif char == "|" and depth == 0:
            return True
    return False


def _has(words: np.ndarray, token: int) -> bool:
    word = token // _WORD
    return word < words.size and bool(words[word] >> np.uint32(token % _WORD) & np.uint32(1))
