"""Kimi's tokenizer against tiktoken's tokens (tools/make_tokenizer_fixture.py); refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.common.errors import CheckpointError
from jaxmoe.text import tiktoken_file
from jaxmoe.text.tokenizer import Tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "kimi_tokens.json").read_text())
NUM_TOKENS = len(FIXTURE["ranks"])


def write(directory: Path, **changes: Any) -> None:
    lines = [f"{token} {rank}" for rank, token in enumerate(FIXTURE["ranks"])]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    named = {
        str(NUM_TOKENS + at): {"content": name, "special": name != "<think>"}
        for at, name in enumerate(FIXTURE["special"])
    }
    config = {
        "added_tokens_decoder": named,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer",
    } | changes
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kimi")
    write(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    assert Tokenizer.is_in(directory)
    return Tokenizer.from_dir(directory)


def test_every_text_has_tiktokens_tokens(tokenizer: Tokenizer):
    assert len(FIXTURE["encoded"]) > 200
    for text, ids in FIXTURE["encoded"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("unit", FIXTURE["last_of_long"])
def test_long_runs_are_cut_where_the_shipped_code_cuts_them(tokenizer: Tokenizer, unit: str):
    run = unit * (25_000 // len(unit))
    ids = tokenizer.encode(run + unit * 7 + " x")
    assert ids[-12:] == FIXTURE["last_of_long"][unit]


def test_pieces_are_the_whole_text():
    text = "a" * 60_000 + " " * 30_000 + "b c" * 150_000
    parts = list(tiktoken_file.pieces(text))
    assert "".join(parts) == text
    assert [len(p) for p in parts[:3]] == [25_000, 25_000, 10_000 + 25_000]
    assert max(map(len, parts)) <= 400_000


def test_special_tokens(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == NUM_TOKENS + 256
    assert tokenizer.bos_token_id is None and tokenizer.eos_token_ids == (NUM_TOKENS + 1,)
    end, think = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<think>")
    assert (end, think) == (NUM_TOKENS + 2, NUM_TOKENS + 4)
    assert tokenizer.decode([think, end]) == "<think>"  # the one is text, the other is not
    assert tokenizer.token_id(f"<|reserved_token_{NUM_TOKENS + 255}|>") == NUM_TOKENS + 255


def test_other_models_tokenizers_are_refused_by_name(tmp_path: Path):
    write(tmp_path, auto_map={"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]})
    assert not Tokenizer.is_in(tmp_path)
    with pytest.raises(CheckpointError, match="QWenTokenizer.*only tokenization_kimi"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: lines[:300] + lines[301:], "line 301 .*rank 300"),
        (lambda lines: [*lines[:9], "not base64! 9", *lines[10:]], "line 10 .*rank 9"),
        (lambda lines: [*lines, f"{lines[5].split()[0]} {len(lines)}"], f"line {NUM_TOKENS + 1}"),
        (lambda lines: lines[:200], "byte 200 has no token"),
        (lambda lines: [*lines[:3], "AA==", *lines[4:]], "line 4"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, directory: Path, damage: Any, words: str):
    shutil.copy(directory / "tokenizer_config.json", tmp_path)
    lines = (directory / "tiktoken.model").read_text().splitlines()
    (tmp_path / "tiktoken.model").write_text("\n".join(damage(lines)))
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.from_dir(tmp_path)


def test_a_special_token_twice_is_refused(tmp_path: Path):
    double = {str(NUM_TOKENS + at): {"content": "[EOS]"} for at in (0, 1)}
    write(tmp_path, added_tokens_decoder=double)
    with pytest.raises(CheckpointError, match="another token too"):
        Tokenizer.from_dir(tmp_path)
    write(tmp_path, added_tokens_decoder=[1])
    with pytest.raises(CheckpointError, match="added_tokens_decoder is"):
        Tokenizer.from_dir(tmp_path)
