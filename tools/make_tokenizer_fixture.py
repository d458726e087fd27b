"""Writes what tests/text holds Kimi's tokenizer to: a small tiktoken.model and tiktoken's tokens.

    python tools/make_tokenizer_fixture.py      needs tiktoken and tokenizers; jaxmoe is not used

The pattern, the special tokens and the cuts in long texts are those of the Python code that
Kimi-K2 ships, written down here a second time on purpose.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

FIXTURE = Path(__file__).resolve().parents[1] / "tests" / "text" / "fixtures" / "kimi_tokens.json"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CORPUS = [
    "In the beginning God created the heaven and the earth. And God said, Let there be light.",
    "def apply(x, y):\n    return x + y  # 12345\n\n\n    for i in range(1000):\n\t\tprint(i)\n",
    "1000 000 000",
    "你好世界，世界你好。中文分词测试 日本語のテキスト 안녕하세요 привет мир Straße naïve café",
    "aaaa aaaaaaaa abab abababab -------- ======== ........ I'll we'd THEY'RE it's 🙂🙂 👩‍👩‍👧",
]
SPECIAL = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<think>"]
NUM_SPECIAL = 256
LONGEST_RUN = 25_000


def train() -> list[bytes]:
    """Byte strings in the order of their ranks: the bytes, then what training merged."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(b): b for b in visible}
    byte_of |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in visible)}
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[c] for c in token) for token, _ in ordered]
    return [bytes([b]) for b in range(256)] + [token for token in tokens if len(token) > 1]


def texts() -> list[str]:
    rng = random.Random(0)
    alphabets = ["ab", " \n\t", "-=.", "aA'sS ", "你好a1 ", "e\u0301ñ ", "0123456789,. "]
    made = [*CORPUS, "", " ", "\n", "ſ'ſ 'S 'LL x'Re", "〇一二three", "ǅ ⅷ ½ ²", "\x00\x7f\x85\xa0"]
    for _ in range(120):
        alphabet = rng.choice(alphabets)
        made.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40))))
    for _ in range(60):
        text = rng.choice(CORPUS)
        at = rng.randrange(len(text))
        made.append(rng.choice(["", *SPECIAL]) + text[at : at + 30] + rng.choice(SPECIAL) + "x")
    for _ in range(60):
        blocks = [(0, 0x80), (0x80, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
        made.append("".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(12)))
    return made


def main() -> None:
    tokens = train()
    special = {name: len(tokens) + at for at, name in enumerate(SPECIAL)}
    for token_id in range(len(tokens) + len(SPECIAL), len(tokens) + NUM_SPECIAL):
        special[f"<|reserved_token_{token_id}|>"] = token_id
    encoding = tiktoken.Encoding(
        "kimi",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens=special,
    )
    reserved = f"x<|reserved_token_{len(tokens) + 200}|>"
    encoded = [
        [text, encoding.encode(text, allowed_special="all")] for text in [*texts(), reserved]
    ]
    long = {}
    for unit in ("0", "ab", " "):  # a run is cut when it grows too long, and so are the tokens
        run = unit * (LONGEST_RUN // len(unit))
        whole = [run[:LONGEST_RUN], unit * 7 + " x"]
        long[unit] = sum((encoding.encode(part) for part in whole), [])[-12:]
    fixture = {
        "ranks": [base64.b64encode(token).decode() for token in tokens],
        "special": SPECIAL,
        "encoded": encoded,
        "last_of_long": long,
        "made_with": f"tiktoken {tiktoken.__version__}",
    }
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(fixture, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{FIXTURE}: {len(tokens)} tokens, {len(encoded)} texts, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
