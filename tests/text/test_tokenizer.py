import random

import pytest
import tokenizers
from support import tiny_tokenizer
from tokenizers import decoders, models

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.text.tokenizer import ByteTokenizer, Tokenizer, check_ids

TEXTS = ["the earth", "  two  spaces\n", "naïve 你好 🙂", "👩‍👩‍👧", "", "a<think>b", "\x00\x7f"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write(path)
    return Tokenizer.from_dir(path)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_bos(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == 0
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_a_bos_that_is_already_there_is_not_doubled(tokenizer):
    assert tokenizer.encode(tiny_tokenizer.BOS + "the").count(0) == 1


def test_decode_agrees_with_the_library_on_any_ids(tokenizer):
    rng = random.Random(0)
    library = tiny_tokenizer.byte_level()
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 12))]
        for skip in (True, False):
            want = library.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == want


def test_special_tokens_are_left_out_on_request_only(tokenizer):
    assert tokenizer.decode([0, 1]) == ""
    assert tokenizer.decode([0, 1], skip_special_tokens=False) == "<｜bos｜><｜eos｜>"
    assert tokenizer.eos_token_ids == (1,)
    think = tokenizer.token_id("<think>")
    assert tokenizer.decode([think]) == "<think>"


def test_which_tokens_are_marks():
    backend = tiny_tokenizer.byte_level()
    known = Tokenizer(backend).tag_ids()
    backend.add_tokens(["<a tag>", "｜DSML｜", "｜a", "<b", "word", "｜｜"])
    tokenizer = Tokenizer(backend)
    new = {tokenizer.token_id(text) for text in ("<a tag>", "｜DSML｜")}
    assert tokenizer.tag_ids() == known | new


def test_sentencepiece_tokens_have_bytes():
    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "▁the": 4, "s": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    assert Tokenizer(backend).decode([4, 5, 1, 2, 3]) == " thes€"


@pytest.mark.parametrize(
    "text,words",
    [("a\ud800b", "character 1 is the lone surrogate U\\+D800"), (5, "got 5"), (None, "got None")],
)
def test_texts_that_are_none(tokenizer, text, words):
    with pytest.raises(RequestError, match=words):
        tokenizer.encode(text)


@pytest.mark.parametrize("bad", [-1, 100, 2**70, True, 1.0, "1", None])
def test_ids_out_of_range(bad):
    with pytest.raises(RequestError, match="entry 1 is"):
        check_ids([0, bad], 100)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json: not found"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tiktoken.model").write_text("")
    with pytest.raises(CheckpointError, match="only tokenization_kimi"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    tiny_tokenizer.write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: holds a list"):
        Tokenizer.from_dir(tmp_path)


def test_an_unknown_decoder_is_refused():
    backend = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="decoder WordPiece is not supported"):
        Tokenizer(backend)


def test_byte_tokenizer():
    assert ByteTokenizer(300).decode(ByteTokenizer(300).encode("naïve")) == "naïve"
    assert max(ByteTokenizer(100).encode("naïve")) < 100
    assert ByteTokenizer(300).decode([65, 299]) == "A<299>"
