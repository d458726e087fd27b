"""Log probabilities in OpenAI's two shapes: chat's list of objects, completions' four lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmoe.engine.async_engine import EngineInfo
from jaxmoe.request import TokenLogprob
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenTexts:
    """Texts of tokens as they stand in the answer: tokens that add nothing to its text (control
    tokens that are skipped) are empty, so that tokens joined are the text.

    stop_ids: tokens that end the answer and are no part of it.
    """

    tokenizer: Tokenizer | None
    skip_special: bool
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, params: SamplingParams, info: EngineInfo):
        eos = () if params.ignore_eos else info.eos_token_ids
        return cls(
            tokenizer, params.skip_special_tokens, frozenset(eos) | set(params.stop_token_ids)
        )

    def raw(self, token_id: int, *, chosen: bool = False) -> bytes:
        """chosen: part of the answer; alternatives are always shown."""
        if self.tokenizer is None:
            return f"token_id:{token_id}".encode()
        skip = chosen and self.skip_special
        return self.tokenizer.token_bytes(token_id, skip_special_tokens=skip)

    def text(self, token_id: int, *, chosen: bool = False) -> str:
        return self.raw(token_id, chosen=chosen).decode("utf-8", errors="replace")

    def shown(
        self, ids: Sequence[int], entries: Sequence[TokenLogprob], finish_reason: str | None
    ) -> tuple[Sequence[int], Sequence[TokenLogprob]]:
        """Without the token that ended the answer."""
        if finish_reason not in (None, "length", "abort") and ids and ids[-1] in self.stop_ids:
            return ids[:-1], entries[: len(ids) - 1]
        return ids, entries


def chat_logprobs(entries: Iterable[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """`bytes` holds what `token` cannot: parts of characters."""
    return {"content": [_chat_entry(e, texts) for e in entries], "refusal": None}


def _chat_entry(entry: TokenLogprob, texts: TokenTexts) -> dict[str, Any]:
    def one(token_id: int, logprob: float, chosen: bool) -> dict[str, Any]:
        raw = texts.raw(token_id, chosen=chosen)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": finite(logprob),
            "bytes": None if texts.tokenizer is None else list(raw),
        }

    top = [one(i, p, False) for i, p in entry.top]
    return {**one(entry.token_id, entry.logprob, True), "top_logprobs": top}


def completion_logprobs(
    entries: Sequence[TokenLogprob | None],
    token_ids: Sequence[int],
    texts: TokenTexts,
    offset: int,
) -> dict[str, Any]:
    """entries: one a token; None where a token has none (the first of a prompt). offset: of the
    first token in the text.
    """
    tokens = [texts.text(i, chosen=True) for i in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if e is None else finite(e.logprob) for e in entries],
        "top_logprobs": [None if e is None else _with_chosen(e, texts) for e in entries],
        "text_offset": offsets,
    }


def _with_chosen(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """By text, the likeliest first; the chosen token is there though it be none of them. Of tokens
    with one text (parts of characters) the likeliest stands.
    """
    out: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        out.setdefault(texts.text(token_id), finite(logprob))
    return out


def finite(logprob: float) -> float:
    """JSON has no infinities; -9999 is what OpenAI sends for "not at all"."""
    return max(logprob, -9999.0)


def prompt_logprobs_object(
    entries: Sequence[TokenLogprob | None], texts: TokenTexts
) -> list[dict[str, Any] | None]:
    """One entry a prompt token: {token id: {logprob, decoded_token}}; null for the first."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {"logprob": finite(logprob), "decoded_token": texts.text(token_id)}

    return [
        None if e is None else {str(i): one(i, p) for i, p in ((e.token_id, e.logprob), *e.top)}
        for e in entries
    ]
