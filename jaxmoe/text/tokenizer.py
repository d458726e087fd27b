"""Text to token ids and back, for tokenizers shipped as tokenizer.json, or as Kimi's are.

Ids go back to text through bytes: every token has a fixed byte string, so a text can be put
together piece by piece and cut anywhere without ever decoding a character twice or in halves. Two
families of decoders give tokens such bytes: byte-level BPE (DeepSeek, Qwen) and SentencePiece-like
BPE with byte fallback. What it does not do: chat templates.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.common.fields import shown
from jaxmoe.text import tiktoken_file
from jaxmoe.text.byte_level import byte_level_table

_MARK = re.compile(r"(?s)<.*>|\uff5c.+\uff5c")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's visible space


class Tokenizer:
    """A checkpoint's tokenizer.

    bos_token_id: put before a text prompt where the checkpoint says so, else None. eos_token_ids:
    what the tokenizer's own configuration calls end of text (generation_config and config take
    precedence).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        cut: Callable[[str], Iterable[str]] | None = None,
    ) -> None:
        """`cut`: into parts that are encoded one by one, where the tokenizer is defined so."""
        config = config or {}
        self._backend = backend
        self._cut = cut
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config = config
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._special = frozenset(
            i for i, t in backend.get_added_tokens_decoder().items() if t.special
        )
        self._bytes_of = _bytes_of_tokens(backend)
        self.bos_token = token_text(config.get("bos_token"))
        self.eos_token = token_text(config.get("eos_token"))
        self.bos_token_id = self.token_id(self.bos_token) if config.get("add_bos_token") else None
        eos = self.token_id(self.eos_token)
        self.eos_token_ids = () if eos is None else (eos,)

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, or else a tiktoken.model, and tokenizer_config.json of a checkpoint
        directory.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file() and (path / tiktoken_file.FILE).is_file():
            config = read_json(path / "tokenizer_config.json")
            return cls(tiktoken_file.build(path, config), config, tiktoken_file.pieces)
        if not file.is_file():
            have = [n for n in ("tokenizer.model",) if (path / n).is_file()]
            raise CheckpointError(
                f"{file}: not found"
                + (f" ({have[0]} is not supported)" if have else "")
                + "; give prompts as token ids, or add a tokenizer.json"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises plain Exception
            raise CheckpointError(f"{file}: not a tokenizer: {e}") from None
        return cls(backend, read_json(path / "tokenizer_config.json"))

    @staticmethod
    def is_in(path: Path) -> bool:
        """Whether a checkpoint directory has a tokenizer that `from_dir` knows."""
        return (path / "tokenizer.json").is_file() or (
            (path / tiktoken_file.FILE).is_file()
            and tiktoken_file.is_known(read_json(path / "tokenizer_config.json"))
        )

    def token_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def tag_ids(self) -> frozenset[int]:
        """Tokens that are marks and no text: the special ones, and added ones such as `<think>` and
        DeepSeek's between full-width bars that some checkpoints do not call special.
        """
        added = self._backend.get_added_tokens_decoder()
        return self._special | {i for i, t in added.items() if _MARK.fullmatch(t.content)}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens=False` for texts that a chat template wrote."""
        check_text(text, "prompt")
        ids: list[int] = []
        for part in [text] if self._cut is None else self._cut(text):
            ids += self._backend.encode(part, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_token_id is not None:
            if not ids or ids[0] != self.bos_token_id:
                ids = [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = list(ids)
        check_ids(ids, self.vocab_size)
        pieces = (self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        """What a token adds to the text. Ids that the tokenizer does not have (padding rows
        of the embedding) add nothing.
        """
        if skip_special_tokens and token_id in self._special:
            return b""
        return self._bytes_of(token_id)


class ByteTokenizer(Tokenizer):
    """Text as its UTF-8 bytes, modulo the vocabulary: for random weights of a directory without a
    tokenizer.

    What such a model writes means nothing; this only lets prompts be given as text.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.config = {}
        self.bos_token = self.eos_token = self.bos_token_id = None
        self.eos_token_ids = ()

    def token_id(self, token: str | None) -> int | None:
        return None

    def tag_ids(self) -> frozenset[int]:
        return frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        check_text(text, "prompt")
        return [b % self.vocab_size for b in text.encode()]

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        return bytes([token_id]) if token_id < 256 else f"<{token_id}>".encode()


def check_text(text: Any, name: str) -> None:
    """Refuses what no tokenizer takes: other types, and halves of UTF-16 pairs (from JSON's
    \\ud800).
    """
    if not isinstance(text, str):
        raise RequestError(f"{name}: got {shown(text)}, wanted text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise RequestError(
            f"{name}: character {e.start} is the lone surrogate U+{ord(text[e.start]):04X}, wanted "
            "valid Unicode; remove it"
        ) from None


def check_ids(ids: Sequence[Any], vocab_size: int, name: str = "token ids") -> None:
    """Refuses ids that are no integers of 0..vocab_size-1."""
    for at, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestError(f"{name}: entry {at} is {shown(token_id)}, wanted an integer")
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name}: entry {at} is {shown(token_id)}, wanted 0 to {vocab_size - 1} "
                "(the vocabulary)"
            )


def token_text(entry: Any) -> str | None:
    """A special token of tokenizer_config.json, written as a string or as {"content": ...}."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object of a checkpoint; {} where the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, wanted an object")
    return value


def _bytes_of_tokens(backend: tokenizers.Tokenizer):
    """A cached function token id -> bytes, by the decoder that tokenizer.json names."""
    kinds = _decoder_kinds(json.loads(backend.to_str()).get("decoder"))
    added = backend.get_added_tokens_decoder()
    if "ByteLevel" in kinds:
        table = byte_level_table()

        def to_bytes(text: str) -> bytes:
            if all(c in table for c in text):
                return bytes(table[c] for c in text)
            return text.encode()

    elif "ByteFallback" in kinds or "Metaspace" in kinds:

        def to_bytes(text: str) -> bytes:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            return text.replace(_SPACE, " ").encode()

    else:
        raise CheckpointError(
            f"tokenizer.json: decoder {', '.join(kinds) or 'none'} is not supported; supported: "
            "ByteLevel, Metaspace, ByteFallback"
        )

    @functools.lru_cache(maxsize=1 << 18)
    def bytes_of(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id].content.encode()
        token = backend.id_to_token(token_id)
        return b"" if token is None else to_bytes(token)

    return bytes_of


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return [kind for d in decoder.get("decoders", []) for kind in _decoder_kinds(d)]
    return [str(decoder.get("type"))]
