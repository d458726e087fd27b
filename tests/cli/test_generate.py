"""The command on an engine computable by hand: it answers every prompt with its letters
reversed.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxmoe.cli import command, generate
from jaxmoe.cli.batch_lines import LineError, parse_line
from jaxmoe.cli.batch_output import BatchOutput
from jaxmoe.common.errors import ConfigError


@pytest.fixture
def run(loaded, capsys):
    """Runs the command; returns exit code, stdout and stderr."""

    def run(*argv):
        code = generate.main(["jaxmoe_generate", *argv])
        return code, *capsys.readouterr()

    return run


def batch(run, tmp_path, lines, *argv):
    """Runs a batch; returns the records by line number."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    source.write_text(text + "\n", encoding="utf-8")
    code, out, err = run(f"--input={source}", f"--output={target}", *argv)
    assert code == 0 and out == "", err
    records = [json.loads(x) for x in target.read_text().splitlines()]
    return {r["line"]: r for r in records}, err


def test_a_prompt_streams_to_stdout_and_the_rest_goes_to_stderr(run):
    code, out, err = run("--prompt=hello")
    assert (code, out) == (0, "olleh\n")
    assert "the report" in err and "5 prompt + 6 output tokens" in err
    assert run("--prompt=hello", "--quiet") == (0, "olleh\n", "")


def test_a_terminal_without_the_answers_characters_gets_question_marks(run, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    generate.main(["jaxmoe_generate", "--quiet", "--prompt=é!", "--ignore_eos", "--max_tokens=3"])
    assert narrow.buffer.getvalue().startswith(b"!??")  # type: ignore[attr-defined]


def test_more_prompts_choices_and_chat(run):
    code, out, _ = run("--prompt=ab", "--prompt=cd", "--n=2")
    assert out == "=== ab [0]\nba\n=== ab [1]\nba\n=== cd [0]\ndc\n=== cd [1]\ndc\n"
    assert run("--prompt=ab", "--chat")[1] == ">ba<\n"
    assert run("--prompt=abcdef", "--max_tokens=2")[1] == "fe\n"
    assert run("--prompt=abcdef", "--stop=cb")[1] == "fed\n"


@pytest.mark.parametrize(
    "argv,words",
    [
        ([], "wanted either --prompt=TEXT or --input"),
        (["--prompt=a", "--input=b"], "wanted either"),
        (["--input=b"], "--input and --output go together"),
        (["--prompt="], "--prompt: got an empty text"),
        (["--prompt=x", "stray"], "unexpected argument 'stray'"),
        (
            ["--prompt=x", "--temprature=1"],
            "unknown flag --temprature (did you mean 'temperature'?)",
        ),
        (["--prompt=x", "--chat=maybe"], "--chat=maybe: got 'maybe', wanted true or false"),
        (["--prompt=x", "--temperature=nan"], "temperature: got nan"),
        (["--prompt=x", "--top_p=0"], "top_p: got 0.0, wanted a finite number above 0.0 to 1.0"),
        (["--prompt=x", "--max_num_seqs=0"], "max_num_seqs: got 0"),
        (["--prompt=x", "--compute_dtype=int8"], "compute_dtype: got 'int8', wanted one of"),
        (["--prompt=x", "--max_tokens=100"], "prompt (1 tokens) + max_tokens (100) = 101"),
        (["--prompt=" + "x" * 50], "the prompt has 50 tokens, but the context holds 40"),
        (["--prompt=x\ud800"], "lone surrogate"),
        (["--prompt=x", "--config=/no/such.toml"], "config file /no/such.toml: No such file"),
        (["--input=/no/such", "--output=/tmp/x"], "input /no/such: No such file"),
        (
            ["--input=/dev/null", "--output=/tmp/x"],
            "input /dev/null: is a pipe or a terminal, not a regular file",
        ),
        ([f"--input={__file__}", "--output=/no/such/x"], "output /no/such/x: No such file"),
        ([f"--input={__file__}", "--output=/dev/full"], "output /dev/full: not a regular file"),
        (["--prompt=x", "--logit_bias=300:1"], "logit_bias: entry 0 is 300"),
        (["--prompt=x", "--logprobs=2"], "logprobs: the text of a --prompt has no place for them"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(run, argv, words):
    code, out, err = run("--quiet", *argv)
    assert code == 1 and out == ""
    assert err.startswith("jaxmoe_generate: error: ") and words in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_pipe_is_refused_since_the_input_is_read_twice(run, tmp_path):
    source = tmp_path / "pipe"
    os.mkfifo(source)
    keep = os.open(source, os.O_RDWR)  # a writer, or opening it for reading would wait
    os.write(keep, b'{"prompt": "a"}\n')
    code, out, err = run(f"--input={source}", f"--output={tmp_path / 'out'}", "--quiet")
    os.close(keep)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is a pipe or a terminal, not a regular file" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--max_model_len=8"], "the prompt has .* tokens, but the context holds 8"),
        (["--max_model_len=64", "--max_tokens=64"], "lower max_tokens to"),
        (["--chat", "--max_model_len=8"], "the prompt has .* tokens, but the context holds 8"),
    ],
)
def test_a_prompt_too_long_is_refused_before_a_weight_is_read(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "load", None)  # would be a TypeError
    prompt = "In the beginning God created the heaven and the earth."
    assert generate.main(["jaxmoe_generate", f"--prompt={prompt}", *argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.search(words, err) and len(err.splitlines()) == 1


def test_a_missing_model_is_one_line(capsys):
    assert generate.main(["jaxmoe_generate", "--model=/no/such", "--prompt=x"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "/no/such: no such directory" in err


def test_help_needs_no_jax():
    code = textwrap.dedent("""
        import sys
        from jaxmoe.cli.generate import main
        code = main(["jaxmoe_generate", "--help"])
        assert "jax" not in sys.modules
        sys.exit(code)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--temperature=" in done.stdout and "--[no]ignore_eos" in done.stdout


def test_plain_lines(run, tmp_path):
    records, err = batch(
        run,
        tmp_path,
        [
            {"prompt": "hello"},
            {"id": "b", "prompt": "abcd", "max_tokens": 2, "n": 2, "logprobs": 1},
            "",
            {"messages": [{"role": "user", "content": "hi"}]},
            {"prompt": [65, 66]},
            {"prompt": "hello", "temperature": None, "stop": "l"},
        ],
    )
    assert [records[i]["text"] for i in (1, 2, 4, 5, 6)] == ["olleh", "dc", ">ih<", "BA", "o"]
    assert records[1]["error"] is None and records[1]["custom_id"] is None
    assert records[1]["finish_reason"] == "stop"
    assert records[1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    two = records[2]
    assert two["custom_id"] == "b" and [c["text"] for c in two["choices"]] == ["dc", "dc"]
    assert two["logprobs"][0] == {"token_id": 100, "logprob": -0.5, "top": [[100, -0.5]]}
    assert "5 answered, 0 with an error" in err


def openai(custom_id, body, url="/v1/completions", **more):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body} | more


def test_openai_lines(run, tmp_path):
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_completion_tokens": 3,
        "logprobs": True,
        "top_logprobs": 1,
    }
    records, _ = batch(
        run,
        tmp_path,
        [
            openai("a", {"model": "m", "prompt": "abc", "logprobs": 1, "logit_bias": {"7": 1}}),
            openai("b", {"prompt": ["ab", "cd"], "n": 2}),
            openai("c", chat, "/v1/chat/completions"),
        ],
        "--temperature=0",
    )
    body = records[1]["response"]["body"]
    assert records[1]["response"]["status_code"] == 200 and records[1]["error"] is None
    assert body["object"] == "text_completion" and body["model"] == "jaxmoe-demo"
    assert body["choices"][0]["text"] == "cba"
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["c", "b", "a"] and logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] == {"c": -0.5}
    choices = records[2]["response"]["body"]["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [
        (0, "ba"),
        (1, "ba"),
        (2, "dc"),
        (3, "dc"),
    ]
    body = records[3]["response"]["body"]
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ">ih", "refusal": None}
    assert choice["finish_reason"] == "length"
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["top_logprobs"][0]["token"]) == (">", [62], ">")


CHAT = [{"role": "user", "content": "hi"}]
BAD_LINES = [
    ("{", "invalid_json", "not valid JSON"),
    ("[1]", "invalid_line", "wanted an object"),
    ('{"prompt": "a", "temperature": NaN}', "invalid_json", "not valid JSON"),
    ({"prompt": ""}, "invalid_request", "prompt is empty"),
    ({"prompt": 5}, "invalid_request", "prompt: got 5"),
    ({"prompt": []}, "invalid_request", "prompt: got []"),
    ({"prompt": [1, "a"]}, "invalid_request", "entry 1 is 'a'"),
    ({"prompt": [999]}, "invalid_request", "entry 0 is 999"),
    ({"prompt": ["fine", ""]}, "invalid_request", "prompt is empty"),
    ({"text": "a"}, "invalid_request", "prompt: missing"),
    ({"prompt": "a", "messages": []}, "invalid_request", "not together"),
    ({"messages": "a"}, "invalid_request", "wanted a list of messages"),
    (
        {"messages": CHAT, "chat_template_kwargs": {"messages": 1}},
        "invalid_request",
        "chat template argument 'messages'",
    ),
    (
        {"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": 1}},
        "invalid_request",
        "add_generation_prompt: got 1, wanted true or false",
    ),
    ({"prompt": "a", "temprature": 1}, "invalid_request", "did you mean 'temperature'"),
    ({"prompt": "a", "temperature": "1"}, "invalid_request", "temperature: got '1'"),
    ({"prompt": "a", "max_tokens": 99}, "context_length_exceeded", "max_tokens (99) = 100"),
    ({"prompt": "a", "echo": True}, "invalid_request", "unknown field 'echo'"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "invalid_request", "logit_bias: got 'x'"),
    ({"id": 5, "prompt": "a"}, "invalid_request", "custom_id: got 5"),
    (openai(None, {"prompt": "a"}), "invalid_request", "custom_id: missing"),
    (openai("x1", {"prompt": "a"}, method="GET"), "invalid_request", "method: got 'GET'"),
    (openai("x2", {"prompt": "a"}, "/v1/images"), "invalid_request", "url: got '/v1/images'"),
    (openai("x3", "a"), "invalid_request", "body: got 'a'"),
    (openai("x4", {"prompt": "a"}, extra=1), "invalid_request", "unknown field 'extra'"),
    (
        openai("x5", {"messages": [], "top_logprobs": 1}, "/v1/chat/completions"),
        "invalid_request",
        "messages: got 0 entries",
    ),
]


def test_every_bad_line_gets_its_own_record_and_the_good_ones_are_answered(run, tmp_path):
    lines = [bad for bad, _, _ in BAD_LINES]
    lines.insert(7, {"id": "good", "prompt": "ok"})
    lines += [{"id": "good", "prompt": "again"}]
    records, err = batch(run, tmp_path, lines)
    assert len(records) == len(lines)
    assert records.pop(8)["text"] == "ko"
    last = records.pop(len(lines))
    assert last["error"]["code"] == "duplicate_id" and last["custom_id"] == "good"
    for (_, code, words), record in zip(
        BAD_LINES, (records[i] for i in sorted(records)), strict=True
    ):
        assert record["error"]["code"] == code, record
        # Only what a body says is a matter of HTTP.
        assert (record["response"] is None) == (record["custom_id"] != "x5")
        assert words in record["error"]["message"], record
    assert f"1 answered, {len(BAD_LINES) + 1} with an error" in err


def test_a_second_run_does_nothing_and_a_longer_input_only_what_is_new(run, tmp_path):
    lines = [{"prompt": "a"}, {"id": "x", "prompt": "b"}, "{", {"id": "x", "prompt": "c"}]
    first, _ = batch(run, tmp_path, lines)
    second, err = batch(run, tmp_path, lines)
    assert first == second and "0 answered, 0 with an error, 4 done before" in err
    third, err = batch(run, tmp_path, [*lines, {"prompt": "new"}])
    assert third[5]["text"] == "wen" and "1 answered" in err and len(third) == 5


def test_a_half_written_line_is_cut_off_and_computed_again(run, tmp_path):
    lines = [{"prompt": "ab"}, {"prompt": "cd"}]
    batch(run, tmp_path, lines)
    target = tmp_path / "out.jsonl"
    whole = target.read_bytes()
    for cut in (1, 2, 30, len(whole.splitlines(True)[1]) - 1):
        target.write_bytes(whole[:-cut])
        records, err = batch(run, tmp_path, lines)
        assert [records[1]["text"], records[2]["text"]] == ["ba", "dc"]
        done = 2 if cut == 1 else 1  # without its newline alone the record is whole
        assert f"{2 - done} answered, 0 with an error, {done} done before" in err


def test_a_file_that_is_no_output_is_left_alone(run, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_text('{"prompt": "a"}\n')
    for text in ("my notes\nmore\n", '{"a": 1}\nx'):
        target.write_text(text)
        code, _, err = run(f"--input={source}", f"--output={target}")
        assert code == 1 and "line 1 is no record" in err and target.read_text() == text
    code, _, err = run(f"--input={source}", f"--output={source}")
    assert code == 1 and "is the input" in err and source.read_text() == '{"prompt": "a"}\n'


def test_two_runs_cannot_share_an_output(tmp_path):
    with BatchOutput(tmp_path / "o"):
        with pytest.raises(ConfigError, match="another run is writing"):
            BatchOutput(tmp_path / "o")


def test_an_overlong_line_is_refused_by_its_length():
    with pytest.raises(LineError, match="wanted at most") as e:
        parse_line(b" " * ((32 << 20) + 1), 1)
    assert e.value.code == "line_too_long"


def test_results_are_written_as_they_finish_and_survive_a_kill(tmp_path):
    """A run killed with SIGKILL in the middle, repeated until done: every line once,
    nothing computed twice.
    """
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"p{i:02}" for i in range(40)]
    source.write_text("".join(json.dumps({"id": n, "prompt": n}) + "\n" for n in names))
    code = textwrap.dedent(f"""
        import sys, os, signal
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import jaxmoe.llm
        from jaxmoe.cli import batch_output, generate
        from conftest import make_llm
        jaxmoe.llm.LLM.of = classmethod(lambda cls, config: make_llm(config))
        write, left = batch_output.BatchOutput.write, [13]
        def dying(self, record):
            left[0] -= 1
            if not left[0]:
                data = batch_output.orjson.dumps(record)
                os.write(self._fd, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, record)
        batch_output.BatchOutput.write = dying
        sys.exit(generate.main(sys.argv))
    """)
    argv = [sys.executable, "-c", code, f"--input={source}", f"--output={target}", "--quiet"]
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(subprocess.run(argv, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode)
    assert codes == [-signal.SIGKILL] * 3 + [0]  # 12 whole records a run
    records = [json.loads(x) for x in target.read_text().splitlines()]
    assert sorted(r["custom_id"] for r in records) == names
    assert all(r["text"] == r["custom_id"][::-1] for r in records)
