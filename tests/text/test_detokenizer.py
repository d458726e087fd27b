import random

import pytest

from jaxmoe.text.detokenizer import Detokenizer

TEXT = "naïve 👩‍👩‍👧 🙂 über"


def feed(detokenizer, pieces):
    return [detokenizer.push(p) for p in pieces] + [detokenizer.finish()]


def test_characters_come_whole():
    given = feed(Detokenizer(), [bytes([b]) for b in TEXT.encode()])
    assert "".join(given) == TEXT
    assert all("\ufffd" not in g for g in given)
    assert [g for g in given if g] == list(TEXT)


def test_half_a_character_at_the_end_is_replaced_and_bad_bytes_do_not_block():
    assert feed(Detokenizer(), ["é".encode()[:1]]) == ["", "\ufffd"]
    assert feed(Detokenizer(), [b"\xff", b"a"]) == ["\ufffd", "a", ""]


@pytest.mark.parametrize(
    "stops,pieces,given,by",
    [
        (["END"], [b"a", b"E", b"N", b"x"], ["a", "", "", "ENx", ""], None),
        (["END"], [b"aE", b"ND", b"more"], ["a", "", "", ""], "END"),
        (["END"], [b"aEEN", b"D"], ["aE", "", ""], "END"),
        (["END"], [b"aEN"], ["a", "EN"], None),
        (["abc", "b"], [b"xab"], ["xa", ""], "b"),
        (["bc", "abcd"], [b"xab", b"cd"], ["x", "a", ""], "bc"),
        (["aab"], [b"a", b"a", b"a", b"b"], ["", "", "a", "", ""], "aab"),
        (["🙂"], [b"a\xf0\x9f", b"\x99\x82b"], ["a", "", ""], "🙂"),
        (["x", "xy"], [b"1xy"], ["1", ""], "x"),
        (["\n\n"], [b"a\n", b"b\n\n"], ["a", "\nb", ""], "\n\n"),
    ],
)
def test_stop_strings(stops, pieces, given, by):
    detokenizer = Detokenizer(stops)
    assert feed(detokenizer, pieces) == given
    assert detokenizer.stopped_by == by
    assert detokenizer.text == "".join(given)


def test_the_stop_string_may_be_kept():
    detokenizer = Detokenizer(["END"], include_stop=True)
    assert feed(detokenizer, [b"aE", b"NDx", b"y"]) == ["a", "END", "", ""]
    assert detokenizer.stopped_by == "END"


def test_no_stop_before_it_may():
    detokenizer = Detokenizer(["ab"])
    assert detokenizer.push(b"xaby", may_stop=False) == "xaby"
    assert detokenizer.push(b"a", may_stop=False) == ""
    assert detokenizer.push(b"b") == ""
    assert detokenizer.stopped_by == "ab" and detokenizer.text == "xaby"


@pytest.mark.parametrize("seed", range(30))
def test_any_cutting_gives_what_the_whole_gives(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("aab🙂é\n") for _ in range(40))
    stops = ["".join(rng.choice("ab🙂\n") for _ in range(rng.randrange(1, 5))) for _ in range(3)]
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    want = text[: min(ends)[1]] if ends else text
    data, pieces = text.encode(), []
    while data:
        cut = rng.randrange(1, 6)
        pieces.append(data[:cut])
        data = data[cut:]
    detokenizer = Detokenizer(stops)
    so_far = ""
    for piece in pieces:
        so_far += detokenizer.push(piece)
        assert want.startswith(so_far)
    so_far += detokenizer.finish()
    # Two stops that end at the same place may both be right; a piece may complete two at once.
    assert so_far == want == detokenizer.text
    assert (detokenizer.stopped_by is not None) == bool(ends)
