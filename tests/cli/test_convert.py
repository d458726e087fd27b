"""jaxmoe_convert: one line for each mistake, and a directory that loads."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from support import tiny_models

from jaxmoe.cli.convert import main
from jaxmoe.weights.safetensors_reader import Checkpoint


def test_converts_quietly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            main(["jaxmoe_convert", f"--model={tmp_path / 'a'}", f"--output={tmp_path / 'b'}"]) == 0
        )
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and "pieces" in out and str(tmp_path / "b") in out
    with Checkpoint.open(tmp_path / "b") as checkpoint:
        assert checkpoint.total_bytes > 1_000_000


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    assert main(["x", f"--model={tmp_path / 'a'}", f"--output={tmp_path / 'b'}", "--progress"]) == 0
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model and --output missing"),
        (["--model=a"], "--output missing"),
        (["--model=", "--output=b"], "--model missing"),
        (["--model=/none/such", "--output=b"], "/none/such: does not exist"),
        (["--model=a", "--output=b", "--modle=c"], "unknown flag --modle (did you mean 'model'?)"),
        (["--model=a", "--output=b", "--piece_mb=0"], "piece_mb"),
        (["--model=a", "--output=b", "--piece_mb=x"], "piece_mb"),
        (["--model=a", "--output=b", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jaxmoe_convert", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("jaxmoe_convert: error: ")
    assert "Traceback" not in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["x", f"--model={tmp_path / 'a'}", f"--output={tmp_path / 'b'}"]) == 1
    err = capsys.readouterr().err
    assert str(file) in err and "cut short" in err


def test_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_checkpoint(tmp_path / "a", "qwen3_moe")
    (tmp_path / "file").write_text("")
    assert main(["x", f"--model={tmp_path / 'a'}", f"--output={tmp_path / 'file' / 'b'}"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxmoe_convert", "--help"])
    assert main() == 0
    out = capsys.readouterr().out
    for flag in (
        "--model=...",
        "--output=...",
        "--piece_mb=...",
        "--[no]progress",
        "(default 256)",
    ):
        assert flag in out
    assert "flagfile" not in out and "JAXMOE_" not in out
