"""Grammars over the demo model's real tokenizer, walked token by token through their masks."""

import gc
import json
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.common import limited_child
from jaxmoe.common.errors import CapacityError, RequestError
from jaxmoe.sampling import grammar as grammar_module
from jaxmoe.sampling import grammar_check
from jaxmoe.sampling.grammar import GrammarCompiler
from jaxmoe.sampling.logits import apply_masks
from jaxmoe.structured_output import StructuredOutput
from jaxmoe.text.tokenizer import Tokenizer

EOS = 1
TOKENIZER = Tokenizer.from_dir(Path(jaxmoe.__file__).parent / "demo")
VOCAB = TOKENIZER.vocab_size


def compiler(eos=(EOS,), vocab_size=VOCAB, tokenizer=TOKENIZER):
    return GrammarCompiler.of(tokenizer, eos_token_ids=eos, vocab_size=vocab_size)


COMPILER = compiler()
Spec = StructuredOutput


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def allowed(mask):
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def walk(spec, text, compile=COMPILER):
    """How much of the text is accepted, by the masks; and the grammar afterwards."""
    grammar = compile.matcher(spec)
    done = 0
    for token in ids(text):
        if grammar.complete or token not in allowed(grammar.mask()):
            break
        grammar.accept(token)
        assert grammar.error is None
        done += len(TOKENIZER.token_bytes(token))
    return done, grammar


def fits(spec, text):
    done, grammar = walk(spec, text)
    whole = done == len(text.encode())
    return whole and (grammar.complete or EOS in allowed(grammar.mask()))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "spec,good,bad",
    [
        (
            Spec.json_schema(SCHEMA),
            ['{"name":"x","age":7,"tags":[]}', '{"name": "é", "age": 0, "tags": ["a","b"]}'],
            ['{"name":"x"}', '{"name":"x","age":-1', '{ "name"', '{"name":"123456789', '["a"]'],
        ),
        (Spec.json_object(), ["{}", '{"a": {"b": [1, null]}}'], ["[]", "1", "{\n", '{"a":  1']),
        (Spec.json_schema(True), ["[]", "3", '"x"'], ["x"]),
        (Spec.regex("[0-9]{2,3}"), ["12", "123"], ["1", "1234", "x"]),
        (Spec.regex("^(a|b)c$"), ["ac", "bc"], ["c", "acc"]),
        (Spec.regex("a|b"), ["a", "b"], ["ab"]),
        (Spec.regex(r"a\$"), ["a$"], ["a"]),
        (Spec.choice(["yes", "no", 'a "b"\n']), ["yes", "no", 'a "b"\n'], ["maybe", "ye"]),
        (
            Spec.choice(["\x00\x1f", "\x7f", "\u2028", "\\u0041", "/a/", "𝕏", "x\\"]),
            ["\x00\x1f", "\x7f", "\u2028", "\\u0041", "/a/", "𝕏", "x\\"],
            ["\\x41", "A"],
        ),
        (Spec.choice([f"{i}" * 3 for i in range(4000)]), ["000", "399939993999"], ["40"]),
        (Spec.grammar('start: "x"+ y\ny: "y" | "(" y ")"'), ["xy", "xx((y))"], ["y", "x(y"]),
    ],
)
def test_what_each_kind_allows(spec, good, bad):
    for text in good:
        assert fits(spec, text), text
    for text in bad:
        assert not fits(spec, text), text


def test_the_end_is_known_and_forced():
    done, grammar = walk(Spec.json_schema(SCHEMA), '{"name":"x","age":7,"tags":[]} more')
    assert grammar.complete and done == 30
    _, grammar = walk(Spec.regex("[0-9]*"), "12")
    assert not grammar.complete and EOS in allowed(grammar.mask())
    grammar.accept(EOS)
    assert grammar.complete and grammar.error is None


def test_banned_tokens_are_left_out_unless_nothing_else_is_allowed():
    _, grammar = walk(Spec.regex("[0-9]*"), "12")
    assert EOS not in allowed(grammar.mask({EOS}))
    (two,) = ids("2")
    assert two not in allowed(grammar.mask({EOS, two}))
    _, grammar = walk(Spec.regex("(ab)*"), "a")
    only = allowed(grammar.mask())
    assert allowed(grammar.mask(only)) == only


def test_special_tokens_and_padding_are_masked():
    padded = compiler(vocab_size=VOCAB + 77)
    mask = padded.matcher(Spec.regex("(?s:.*)")).mask()
    assert mask.shape == (-(-(VOCAB + 77) // 32),) and mask.dtype == np.uint32
    free = allowed(mask)
    assert max(free) < VOCAB and not (free & TOKENIZER.tag_ids()) - {EOS} and len(free) > 1900
    # A model with fewer tokens than its tokenizer.
    assert max(allowed(compiler(vocab_size=999).matcher(Spec.regex(".*")).mask())) < 999


def test_several_ends_of_text_and_none():
    several = compiler(eos=(0, EOS)).matcher(Spec.regex("a?"))
    assert {0, EOS} <= allowed(several.mask())
    none = compiler(eos=())
    assert none.matcher(Spec.regex("a?")).mask().any()
    _, grammar = walk(Spec.regex("a?"), "a", none)
    assert grammar.complete


def test_a_token_that_does_not_fit_is_an_error_of_that_sequence_alone():
    one, other = (COMPILER.matcher(Spec.regex("[0-9]+")) for _ in range(2))
    one.accept(ids("x")[0])
    assert one.error and not one.complete
    other.accept(ids("7")[0])
    assert other.error is None


THINK = ("<think>", "</think>")


@pytest.fixture(scope="module")
def thinking_compiler():
    """The demo's tokens with the two tags, as added tokens that are not special."""

    class Tags(Tokenizer):
        def __init__(self):
            self.__dict__.update(TOKENIZER.__dict__)
            self.vocab_size = VOCAB + 2

        def token_bytes(self, token_id, *, skip_special_tokens=False):
            if token_id >= VOCAB:
                return THINK[token_id - VOCAB].encode()
            return super().token_bytes(token_id)

        def tag_ids(self):
            return TOKENIZER.tag_ids() | {VOCAB, VOCAB + 1}

    return compiler(vocab_size=VOCAB + 2, tokenizer=Tags())


def test_thoughts_come_before_the_grammar(thinking_compiler):
    def spec(**more):
        return Spec(kind="regex", value="[0-9]+", thoughts=THINK, **more)

    begin, end = VOCAB, VOCAB + 1
    # The prompt opened the thoughts: free until they end, then newlines or the grammar.
    grammar = thinking_compiler.matcher(spec(begins_in_thoughts=True))
    for token in ids("Hm. What now?"):
        assert not grammar.applies and grammar.mask() is None
        grammar.accept(token)
    grammar.accept(end)
    (newline,) = ids("\n")
    assert newline in allowed(grammar.mask())
    grammar.accept(newline)
    assert newline not in allowed(grammar.mask())
    grammar.accept(ids("7")[0])
    assert grammar.error is None and EOS in allowed(grammar.mask())
    # The model may open them itself, or not.
    grammar = thinking_compiler.matcher(spec())
    first = allowed(grammar.mask())
    assert begin in first and ids("7")[0] in first and ids("x")[0] not in first
    grammar.accept(begin)
    assert grammar.mask() is None
    grammar = thinking_compiler.matcher(spec())
    grammar.accept(ids("7")[0])
    assert begin not in allowed(grammar.mask())
    # Without thoughts the tags are no text.
    free = allowed(thinking_compiler.matcher(Spec.regex("(?s:.*)")).mask())
    assert not free & {begin, end}


def test_the_end_of_thoughts_is_seen_across_tokens():
    grammar = COMPILER.matcher(
        Spec(kind="regex", value="[0-9]+", thoughts=THINK, begins_in_thoughts=True)
    )
    tokens = ids("hm</think>")
    assert len(tokens) > 2
    for token in tokens:
        assert grammar.mask() is None
        grammar.accept(token)
    assert grammar.mask() is not None


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Spec.json_schema({"type": "foo"}), "json_schema: .*[Ii]nvalid type"),
        (lambda: Spec.json_schema({"$ref": "http://x/y"}), "json_schema: .*does not fetch"),
        (lambda: Spec.json_schema({"$ref": "file:///etc/passwd"}), "json_schema: "),
        (lambda: Spec.json_schema({"if": {}, "then": {}}), "Unimplemented keys"),
        (lambda: Spec.json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (lambda: Spec.regex("(?=a)b"), "regex: "),
        (lambda: Spec.regex("("), "regex: "),
        (lambda: Spec.regex(""), "regex: is empty"),
        (lambda: Spec.regex("(){0}"), "regex: no text"),
        (lambda: Spec.regex("(a{1000}){1000}(b{1000}){1000}"), "regex: "),
        (lambda: Spec.regex("a" * 20_000), "wanted at most 16384"),
        (lambda: Spec.regex(3), "got 3, wanted text"),
        (lambda: Spec.regex("\ud800"), "surrogate"),
        (lambda: Spec.choice([]), "got 0 texts"),
        (lambda: Spec.choice(["a", 1]), "got 1, wanted texts"),
        (lambda: Spec.choice("abc"), "wanted a list"),
        (lambda: Spec.choice(["x"] * 5000), "got 5000 texts"),
        (lambda: Spec.grammar("start: nowhere"), "grammar: "),
        (lambda: Spec.grammar("begin: 'x'"), "grammar: "),
        (lambda: Spec.grammar("start: <[99999999]>"), "grammar: "),
        (lambda: Spec.json_schema({"x": "y" * 300_000}), "wanted at most 256000"),
        (lambda: Spec.json_schema([]), r"got \[\], wanted an object"),
        (lambda: Spec.json_schema({"a": float("nan")}), "is no JSON"),
        (lambda: Spec.json_schema({"a": {1, 2}}), "is no JSON"),
        (lambda: Spec(kind="xml", value="x"), "got kind 'xml'"),
        (lambda: Spec(kind="json_schema", value="{"), "is no JSON"),
        (lambda: Spec(kind="regex", value="x", begins_in_thoughts=True), "needs the tags"),
        (lambda: Spec(kind="regex", value="x", thoughts=("a",)), "wanted two tags"),
    ],
)
def test_what_is_refused_at_the_door(make, words):
    with pytest.raises(RequestError, match=words):
        COMPILER.prepare(make())


def test_depth_is_bounded_without_recursion():
    deep = {"type": "integer"}
    for _ in range(50_000):
        deep = {"a": deep}
    with pytest.raises(RequestError, match="nested deeper than 64"):
        Spec.json_schema(deep)
    text = '{"a":' * 10_000 + "{}" + "}" * 10_000
    with pytest.raises(RequestError, match="no JSON|nested deeper"):
        Spec(kind="json_schema", value=text)
    while deep.get("a"):  # taken apart, for its destruction would recurse
        deep = deep["a"]


def test_it_is_plain_data():
    spec = Spec(kind="choice", value='["a"]', thoughts=THINK, begins_in_thoughts=True)
    wire = json.loads(json.dumps(spec.to_json()))
    assert Spec.from_json(wire) == spec and hash(Spec.from_json(wire)) == hash(spec)
    for bad in (None, {}, {"kind": "regex", "extra": 1}, {"kind": "regex", "value": 3}):
        with pytest.raises(RequestError):
            Spec.from_json(bad)


def test_grammars_are_kept_and_the_oldest_forgotten(monkeypatch):
    monkeypatch.setattr(grammar_module, "MAX_CACHED", 3)
    small = compiler()
    first = small.prepare(Spec.regex("a0"))
    assert small.prepare(Spec.regex("a0")) is first
    with_thoughts = Spec(kind="regex", value="a0", thoughts=THINK)
    assert small.prepare(with_thoughts) is first
    for i in range(1, 4):
        small.prepare(Spec.regex(f"a{i}"))
    assert len(small._cache) == 3 and small.prepare(Spec.regex("a0")) is not first
    monkeypatch.setattr(grammar_module, "MAX_CACHED_CHARS", 10)
    small.prepare(Spec.regex("b" * 11))
    assert len(small._cache) == 1 and small._cached_chars == 11
    small.close()


CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)} | {"d5000": {}}


@pytest.mark.parametrize(
    "make,words",
    [
        # These overflow the stack of llguidance, which would end this process.
        (lambda: Spec.json_schema({"$ref": "#/$defs/d0", "$defs": CHAIN}), "nested too deeply"),
        (
            lambda: Spec.grammar(
                "start: a0\n"
                + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(3000))
                + '\na3000: "x"'
            ),
            "nested too deeply",
        ),
        # This takes minutes.
        (lambda: Spec.json_schema({"type": "integer", "multipleOf": 1234567}), "within 0.5 s"),
    ],
)
def test_what_would_end_or_stop_the_process_is_tried_in_another(make, words, monkeypatch):
    monkeypatch.setattr(grammar_check, "CHECK_TIMEOUT_S", 0.5 if "0.5" in words else 60.0)
    with pytest.raises(RequestError, match=words):
        COMPILER.prepare(make())
    monkeypatch.undo()
    COMPILER.prepare(Spec.regex(f"after {words}"))  # by a new child


def test_the_child_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    """A server may be started inside a directory that somebody else filled."""
    (tmp_path / "base64.py").write_text("open('was_run', 'w').close()")
    monkeypatch.chdir(tmp_path)
    compiler().prepare(Spec.regex("[ab]+x"))
    assert not (tmp_path / "was_run").exists()


def test_the_child_ends_with_its_owner():
    own = compiler()
    own.prepare(Spec.regex("ab"))
    child = own._checker._child._child
    assert child.poll() is None
    own.close()
    assert child.poll() is not None
    own.prepare(Spec.regex("abc"))
    child = own._checker._child._child
    del own
    gc.collect()
    assert child.poll() is not None


@pytest.mark.parametrize("program", ["/bin/false", "/no/such/file"])
def test_a_child_that_cannot_start_is_an_error_of_ours(program, monkeypatch):
    monkeypatch.setattr(limited_child.sys, "executable", program)
    with pytest.raises(CapacityError, match="did not start"):
        compiler().prepare(Spec.regex("ab"))


def test_masks_that_take_too_long_end_the_sequence(monkeypatch):
    grammar = COMPILER.matcher(Spec.regex("[a-z]*"))
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(clock)))
    for token in ids("abcdefgh"):
        grammar.accept(token)
    assert grammar.error is not None and "simplify" in grammar.error


def test_a_state_too_complex_ends_the_sequence():
    grammar = COMPILER.matcher(Spec.regex("((a|b){0,500}){0,500}"))
    rng = random.Random(0)
    for _ in range(3000):
        if grammar.error or grammar.complete:
            break
        grammar.accept(ids(rng.choice("ab"))[0])
    assert grammar.error


@pytest.mark.parametrize("seed", range(20))
def test_random_walks_through_masks_are_valid_json(seed):
    rng = random.Random(seed)
    grammar = COMPILER.matcher(Spec.json_schema(SCHEMA))
    out = b""
    while not grammar.complete:
        token = rng.choice(sorted(allowed(grammar.mask())))
        grammar.accept(token)
        out += b"" if token == EOS else TOKENIZER.token_bytes(token)
        assert grammar.error is None
    value = json.loads(out)
    assert set(value) == {"name", "age", "tags"} and 0 <= value["age"] <= 120
    assert len(value["name"]) <= 8 and set(value["tags"]) <= {"a", "b"}


def test_masked_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 77)).astype(np.float32)
    logits[1, 5] = np.nan
    bits = rng.integers(0, 2, size=(3, 96)).astype(np.uint8)
    bits[0] = 1
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    got = np.asarray(jax.jit(apply_masks)(jnp.asarray(logits), jnp.asarray(masks)))
    want = np.where((bits[:, :77] == 1) | np.isnan(logits), logits, -np.inf)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[0].view(np.uint32), logits[0].view(np.uint32))


class PanicException(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("failure", [ValueError, PanicException])
@pytest.mark.parametrize("method", ["consume_token", "unsafe_compute_mask_ptr"])
def test_whatever_the_library_raises_ends_the_sequence_alone(failure, method):
    class Broken:
        def __getattr__(self, name):
            return getattr(real, name)

    def fail(*args):
        raise failure("oh")

    grammar = COMPILER.matcher(Spec.regex("[a-z]+"))
    real = grammar._matcher
    grammar._matcher = Broken()
    setattr(Broken, method, fail)
    grammar.accept(ids("x")[0])
    assert grammar.error == f"{failure.__name__}: oh" and not grammar.complete


def test_an_interrupt_is_no_failure_of_the_grammar():
    grammar = COMPILER.matcher(Spec.regex("[a-z]+"))

    def interrupt(token):
        raise KeyboardInterrupt

    grammar._matcher = type("M", (), {"consume_token": staticmethod(interrupt)})()
    with pytest.raises(KeyboardInterrupt):
        grammar.accept(ids("x")[0])
