"""The command on the embedded demo model, through everything."""

import json

from jaxmoe.cli import generate


def test_the_demo_answers_prompts_and_a_batch(tmp_path, capsys):
    argv = ["jaxmoe_generate", "--temperature=0", "--max_tokens=12", "--quiet"]
    assert generate.main([*argv, "--prompt=In the beginning"]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert len(text.split()) >= 6 and text.isprintable()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "In the beginning"}, {"prompt": "And he said", "seed": 1}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = tmp_path / "trace.json"
    batch = [*argv[:-1], f"--input={source}", f"--output={target}", f"--profile={trace}"]
    assert generate.main(batch) == 0
    said = capsys.readouterr().err
    assert "decode: " in said and "experts read" in said
    assert json.loads(trace.read_text())["traceEvents"]
    records = sorted(map(json.loads, target.read_text().splitlines()), key=lambda r: r["line"])
    assert [r["line"] for r in records] == [1, 2] and records[0]["text"] == text
    assert records[1]["usage"]["completion_tokens"] == 12
