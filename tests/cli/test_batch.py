"""jaxmoe_batch on an engine computable by hand; what it shares with jaxmoe_generate is tested
there.
"""

import json

import pytest
from support import fake_step, front

import jaxmoe.llm
from jaxmoe.cli import batch
from jaxmoe.llm import LLM
from jaxmoe.text.chat_template import ChatTemplate


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
        line(
            "chat", {"model": "any", "messages": messages, "tools": [], "temperature": 0, "new": 1}
        )
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
    error = refused["tools"]["error"]
    assert error["param"] == "tools[0].function" and error["code"] == "invalid_request"
    response = refused["tools"]["response"]
    assert response["status_code"] == 400
    assert response["body"]["error"]["message"] == error["message"]
    assert refused["none"]["response"] is None
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


def test_lines_with_an_error_are_asked_again_where_that_is_wanted(run, files):
    source, target, errors = files
    argv = [f"--input={source}", f"--output={target}", f"--errors={errors}"]
    run(*argv)
    answered = target.read_text()
    messages = [{"role": "user", "content": "hi"}]
    lines = source.read_text().splitlines(True)
    lines[1] = line("tools", {"messages": messages})  # corrected
    source.write_text("".join(lines))
    assert "0 answered, 0 with an error, 4 done before" in run(*argv)[2]
    errors.chmod(0o640)
    code, _, err = run(*argv, "--retry_errors")
    assert code == 0 and "1 answered, 1 with an error, 2 done before" in err
    assert target.read_text().startswith(answered) and read(target)[-1]["custom_id"] == "tools"
    assert [r["custom_id"] for r in read(errors)] == ["none"]
    assert errors.stat().st_mode & 0o777 == 0o640
    assert {p.name for p in target.parent.iterdir()} == {"in.jsonl", "out.jsonl", "errors.jsonl"}


def test_in_one_file_only_the_records_with_an_error_are_replaced(run, files):
    source, target, _ = files
    argv = [f"--input={source}", f"--output={target}"]
    run(*argv)
    kept = [r for r in read(target) if r["error"] is None]
    assert "0 answered, 2 with an error, 2 done before" in run(*argv, "--retry_errors")[2]
    records = read(target)
    assert records[:2] == kept and {r["custom_id"] for r in records[2:]} == {"tools", "none"}


def test_a_dead_engine_ends_the_run_and_no_line_is_at_fault(run, files, monkeypatch):
    source, target, _ = files
    engine, step = fake_step.make_engine(lambda prompt: prompt[::-1], num_pages=64)
    llm = LLM.on_engine(engine, engine.tokenizer, ChatTemplate("{{ messages[0].content }}"))
    llm.report = ""
    monkeypatch.setattr(step, "fail_with", RuntimeError("boom"))
    monkeypatch.setattr(jaxmoe.llm.LLM, "of", classmethod(lambda cls, config: llm))
    code, out, err = run(f"--input={source}", f"--output={target}", "--quiet")
    assert code == 1 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("jaxmoe_batch: error: ") and "boom" in last and "to go on" in last
    assert {r["custom_id"] for r in read(target)} == {"tools", "none"}


TOOLS = [
    {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}}
    for n in ("f", "g")
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
WRITTEN = {
    "json": b'{"a": 12}',
    "forced": b'<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "think": b"<think>\nwell</think>\n\nok"
    b'<tool_call>\n{"name": "g", "arguments": {"x": [1]}}\n</tool_call>',
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def script(prompt):
    for word, text in WRITTEN.items():
        if f"u:{word}".encode() in prompt:
            return text
    return prompt[::-1][:12]


def ask(text, **more):
    return CHAT, {"messages": [{"role": "user", "content": text}], **more}


def complete(prompt, **more):
    return TEXT, {"prompt": prompt, **more}


BODIES = [
    ask("plain", temperature=0, n=2),
    ask("logs", logprobs=True, top_logprobs=2, max_completion_tokens=3),
    ask("json 1", response_format=JSON_SCHEMA),
    ask("json 2", response_format={"type": "json_object"}, return_token_ids=True),
    ask("json 3", structured_outputs={"regex": r"\{.*\}"}),
    ask("forced 1", tools=TOOLS, tool_choice="required"),
    ask("forced 2", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "f"}}),
    ask("think", tools=TOOLS, reasoning_effort="high", verbosity="low", unheard_of=1),
    ask("cut", truncate_prompt_tokens=4, parallel_tool_calls=False, prompt_cache_key="k"),
    complete("abcdefghij", stop=["ed"], n=2),
    complete(["first", [65, 66, 67]], logprobs=1, add_special_tokens=False),
    complete("scored", echo=True, logprobs=1, max_tokens=0),
    complete("a long one, more than 16 tokens", prompt_logprobs=1),
    # Refused.
    ask("hot", temperature=3000),
    ask("bad", response_format={"type": "xml"}),
    ask("bad", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "q"}}}),
    ask("none", tool_choice="required"),
    ask("top", top_logprobs=1),
    ask("u" * 500),
    complete("x", echo=1),
    complete("x", suffix="y"),
    (TEXT, {}),
]


def comparable(value):
    """Without what differs between any two answers: ids, times, and what was in the cache."""
    if isinstance(value, list):
        return [comparable(v) for v in value]
    if not isinstance(value, dict):
        return value
    own = ("id", "created", "cached_tokens")
    return {k: type(v) if k in own else comparable(v) for k, v in value.items()}


def test_a_line_gets_the_servers_answer(run, tmp_path, monkeypatch):
    async def served():
        async with front.serving(script, served_model_name="jaxmoe-demo") as f:
            replies = [await f.post(url, body) for url, body in BODIES]
            return [(r.status_code, r.json()) for r in replies]

    expected = front.run(served())
    assert {status for status, _ in expected} == {200, 400}
    engine, _ = fake_step.make_engine(script, max_model_len=400, num_pages=800)
    llm = LLM.on_engine(engine, engine.tokenizer, ChatTemplate(front.TEMPLATE))
    monkeypatch.setattr(jaxmoe.llm.LLM, "of", classmethod(lambda cls, config: llm))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(
            line(str(at), {"model": "gpt", **body}, url) for at, (url, body) in enumerate(BODIES)
        )
    )
    code, _, err = run(f"--input={source}", f"--output={target}", "--quiet")
    assert code == 0, err
    records = {int(r["custom_id"]): r for r in read(target)}
    for at, (status, body) in enumerate(expected):
        response, error = records[at]["response"], records[at]["error"]
        assert response["status_code"] == status, (BODIES[at], response)
        assert comparable(response["body"]) == comparable(body), BODIES[at]
        if status == 200:
            assert error is None
        else:
            said = body["error"]
            assert (error["message"], error["param"]) == (said["message"], said["param"])
    choices = [body["choices"][0] for status, body in expected if status == 200]
    assert [c["finish_reason"] for c in choices if "message" in c].count("tool_calls") == 3
    thoughts = records[7]["response"]["body"]["choices"][0]["message"]
    assert thoughts["reasoning_content"] == "well" and thoughts["content"] == "ok"


def test_the_command_line_says_what_bodies_do_not(run, tmp_path, loaded):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        line("flag", {"prompt": "abcdef"}, TEXT)
        + line("body", {"prompt": "abcdef", "max_tokens": 2}, TEXT)
        + line("stream", {"prompt": "abcdef", "stream": True}, TEXT)
    )
    argv = [f"--input={source}", f"--output={target}", "--quiet", "--max_tokens=4", "--logprobs=1"]
    assert run(*argv)[0] == 0
    records = {r["custom_id"]: r for r in read(target)}
    assert records["stream"]["error"]["param"] == "stream"
    for name, text in (("flag", "fedc"), ("body", "fe")):
        (choice,) = records[name]["response"]["body"]["choices"]
        assert choice["text"] == text and len(choice["logprobs"]["tokens"]) == len(text)


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "--errors=" in out and "--max_num_seqs is 64" in out
