"""jaxmoe_batch on an engine computable by hand; what it shares with jaxmoe_generate is tested
there.
"""

import json

import pytest

from jaxmoe.cli import batch


@pytest.fixture
def run(loaded, capsys):
    def run(*argv):
        code = batch.main(["jaxmoe_batch", *argv])
        return code, *capsys.readouterr()

    return run


def line(custom_id, body, url="/v1/chat/completions"):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    source.write_text(
        line("chat", {"model": "any", "messages": messages, "tools": [], "temperature": 0})
        + line("tools", {"messages": messages, "tools": [{"type": "function"}]})
        + line("text", {"prompt": "abc", "max_tokens": 2}, "/v1/completions")
        + line("none", {}, "/v1/embeddings")
    )
    return source, tmp_path / "out.jsonl", tmp_path / "errors.jsonl"


def test_answers_and_errors_go_to_their_files(run, files, loaded):
    source, target, errors = files
    argv = [f"--input={source}", f"--output={target}", f"--errors={errors}"]
    code, out, err = run(*argv)
    assert (code, out) == (0, "") and "2 answered, 2 with an error" in err
    answers = {r["custom_id"]: r for r in read(target)}
    assert list(answers) == ["text", "chat"] or list(answers) == ["chat", "text"]
    for number, name, kind in ((1, "chat", "chat.completion"), (3, "text", "text_completion")):
        record = answers[name]
        assert record["id"] == f"batch_req_{number}" and record["error"] is None
        response = record["response"]
        assert response["status_code"] == 200 and response["request_id"]
        assert response["body"]["object"] == kind
    message = answers["chat"]["response"]["body"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": ">ih<>s<", "refusal": None}
    refused = {r["custom_id"]: r for r in read(errors)}
    assert set(refused) == {"tools", "none"}
    assert refused["tools"]["response"] is None
    assert "tools: got" in refused["tools"]["error"]["message"]
    assert "url: got '/v1/embeddings'" in refused["none"]["error"]["message"]
    assert loaded.config.max_num_seqs == batch.MAX_NUM_SEQS

    before = target.read_text(), errors.read_text()
    code, _, err = run(*argv)
    assert code == 0 and "0 answered, 0 with an error, 4 done before" in err
    assert before == (target.read_text(), errors.read_text())
    with source.open("a") as f:
        f.write(line("more", {"prompt": "xy"}, "/v1/completions"))
    assert "1 answered" in run(*argv)[2] and read(target)[-1]["custom_id"] == "more"


def test_without_an_errors_file_everything_is_in_the_output(run, files):
    source, target, _ = files
    code, _, _ = run(f"--input={source}", f"--output={target}", "--quiet")
    assert code == 0 and sorted(r["custom_id"] for r in read(target)) == [
        "chat",
        "none",
        "text",
        "tools",
    ]


def test_more_or_fewer_sequences_may_be_asked_for(run, files, loaded, monkeypatch):
    source, target, _ = files
    argv = [f"--input={source}", f"--output={target}", "--quiet"]
    assert run(*argv, "--max_num_seqs=3")[0] == 0 and loaded.config.max_num_seqs == 3
    monkeypatch.setenv("JAXMOE_MAX_NUM_SEQS", "5")
    assert run(*argv)[0] == 0 and loaded.config.max_num_seqs == 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--input: missing; wanted --input=FILE.jsonl --output=FILE.jsonl"),
        (["--input=IN"], "--output: missing"),
        (["--input=IN", "--output=OUT", "--errors=OUT"], "wanted another file"),
        (["--input=IN", "--output=OUT", "--errors=IN"], "wanted another file"),
        (["--input=IN", "--output=IN"], "is the input"),
        (["--input=IN", "--output=OUT", "stray"], "unexpected argument 'stray'"),
        (["--input=IN", "--outptu=OUT"], "did you mean 'output'?"),
    ],
)
def test_bad_command_lines_are_one_line_and_exit_code_1(run, files, argv, words):
    source, target, _ = files
    argv = [a.replace("IN", str(source)).replace("OUT", str(target)) for a in argv]
    before = source.read_text()
    code, out, err = run(*argv)
    assert code == 1 and out == "" and words in err
    assert err.startswith("jaxmoe_batch: error: ") and err.count("\n") == 1
    assert source.read_text() == before


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "--errors=" in out and "--max_num_seqs is 64" in out
