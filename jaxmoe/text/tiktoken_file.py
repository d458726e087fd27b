"""Tokenizers shipped as `tiktoken.model` with Python code: Kimi-K2's, rebuilt without running it.

The file lists byte strings and their ranks, one a line in base64. What the Python code beside it
adds are facts: the pattern that cuts a text into pieces, 256 special tokens after the last rank
with the names that tokenizer_config.json gives them, and the cuts it makes in very long texts.
Merging by rank is merging by a list of pairs once every split of every token is in the list, in
the order of the tokens' ranks. (Two pairs that make the same token have one rank there and two
here; no text was found in which that shows.) The tokenizers library does the rest.

Other models ship files of this name with other patterns; they are refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxmoe.common.errors import CheckpointError
from jaxmoe.common.fields import shown
from jaxmoe.text.byte_level import byte_level_table

FILE = "tiktoken.model"
_KIMI_CLASS = "tokenization_kimi.TikTokenTokenizer"
_NUM_SPECIAL = 256
_LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Words are an upper part and a lower part, one of which may be missing; Chinese is cut out.
_KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]*[\p{{Ll}}{_LETTERS}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]+[\p{{Ll}}{_LETTERS}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Characters the Python code hands over at once, and the longest run of spaces or of anything else
# in them: the tokens at such a seam are others than without it.
_MOST_CHARS = 400_000
_LONGEST_RUN = 25_000


def build(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a directory with a tiktoken.model and its tokenizer_config.json.

    Raises:
        CheckpointError: if it is another model's, or damaged.
    """
    if not is_known(config):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: auto_map is {shown(config.get('auto_map'))}; of "
            f"tokenizers with a {FILE} only {_KIMI_CLASS} is supported; give prompts as token ids, "
            "or add a tokenizer.json"
        )
    ranks = read_ranks(path / FILE)
    visible = _visible_bytes()
    vocab = {"".join(visible[b] for b in token): rank for token, rank in ranks.items()}
    merges = [
        ("".join(visible[b] for b in left), "".join(visible[b] for b in right))
        for left, right in _merges(ranks)
    ]
    # A piece that is a token as a whole is that token, whatever merging would make of it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_KIMI_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = _special_tokens(path, config, len(ranks))
    backend.add_tokens(specials)
    for at, token in enumerate(specials):
        if backend.token_to_id(token.content) != len(ranks) + at:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: special token {len(ranks) + at} is "
                f"{shown(token.content)}, which is another token too"
            )
    return backend


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer_config.json names the Python code whose facts are here."""
    made_by = config.get("auto_map")
    made_by = made_by.get("AutoTokenizer") if isinstance(made_by, Mapping) else None
    return _KIMI_CLASS in (made_by if isinstance(made_by, list) else [made_by])


def pieces(text: str) -> Iterator[str]:
    """A text cut as the Python code cuts it before it looks for tokens."""
    for start in range(0, len(text), _MOST_CHARS):
        part = text[start : start + _MOST_CHARS]
        cut = 0
        for run in re.finditer(r"\s+|\S+", part):
            for at in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                yield part[cut:at]
                cut = at
        yield part[cut:]


def read_ranks(file: Path) -> dict[bytes, int]:
    """Byte strings to ranks 0..n-1, in that order.

    Raises:
        CheckpointError: naming the line, if a rank is missing, double or no number.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            decoded = base64.b64decode(token, validate=True)
            if int(rank) != len(ranks) or decoded in ranks or not decoded:
                raise ValueError(line)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{file}: line {number} is {shown(line)}; wanted a new token in base64 and rank "
                f"{len(ranks)}"
            ) from None
        ranks[decoded] = len(ranks)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise CheckpointError(f"{file}: byte {missing[0]} has no token; the file is damaged")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every split of every token into two tokens, in the order of the whole's rank."""
    for token in ranks:
        for at in range(1, len(token)):
            if token[:at] in ranks and token[at:] in ranks:
                yield token[:at], token[at:]


def _special_tokens(
    path: Path, config: Mapping[str, Any], first: int
) -> list[tokenizers.AddedToken]:
    """The special tokens from id `first` on; those without a name are reserved."""
    named = config.get("added_tokens_decoder", {})
    if not isinstance(named, Mapping):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: added_tokens_decoder is {shown(named)}, wanted an "
            "object"
        )
    tokens = []
    for token_id in range(first, first + _NUM_SPECIAL):
        entry = named.get(str(token_id), {})
        name = entry.get("content") if isinstance(entry, Mapping) else None
        special = bool(entry.get("special", True)) if isinstance(entry, Mapping) else True
        if not isinstance(name, str) or not name:
            name, special = f"<|reserved_token_{token_id}|>", True
        tokens.append(tokenizers.AddedToken(name, special=special, normalized=False))
    return tokens


def _visible_bytes() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies."""
    return [char for char, _ in sorted(byte_level_table().items(), key=lambda item: item[1])]
