"""Small tokenizers made on the spot, in the shapes that checkpoints ship."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void; and darkness was upon the face of the deep.",
    "naïve café 你好世界 🙂 👩‍👩‍👧 Straße",
]
BOS, EOS = "<｜bos｜>", "<｜eos｜>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n"
    "{% elif m.role == 'user' %}U: {{ m.content }}\n{% else %}A: {{ m.content }}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def byte_level(vocab_size: int = 320) -> tokenizers.Tokenizer:
    """Byte-level BPE as DeepSeek and Qwen have it: ids 0 and 1 are begin and end of text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>"])  # added but not special: it is text
    return tokenizer


def write(directory: Path, tokenizer: tokenizers.Tokenizer | None = None, **config) -> None:
    """tokenizer.json and tokenizer_config.json, with a chat template and dict-form special
    tokens.
    """
    (tokenizer or byte_level()).save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": BOS},
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
    } | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
