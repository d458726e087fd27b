"""Compiled programs are kept by the kind of machine they were compiled for."""

import builtins
import importlib.metadata
import io
import os
from pathlib import Path

import jax
import pytest

from jaxmoe.engine import compile_cache


def fingerprint(monkeypatch, flags: str) -> str:
    text = f"processor : 0\nflags : {flags}\nprocessor : 1\nflags : {flags}\n"
    monkeypatch.setattr(builtins, "open", lambda *args, **kwargs: io.StringIO(text))
    name = compile_cache.machine_fingerprint()
    monkeypatch.undo()
    return name


def test_other_instruction_sets_have_other_programs(monkeypatch):
    plain = fingerprint(monkeypatch, "fpu avx2 fma")
    assert plain == fingerprint(monkeypatch, "fma fpu avx2")
    assert plain != fingerprint(monkeypatch, "fpu avx2 fma avx512f")


def test_another_jaxlib_has_other_programs(monkeypatch):
    before = fingerprint(monkeypatch, "fpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"another {package}")
    with monkeypatch.context() as inner:
        assert before != fingerprint(inner, "fpu")


@pytest.fixture
def no_cache():
    """JAX as a process finds it that chose no directory; put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_nobody_else_can_write_programs(no_cache, tmp_path, caplog):
    os.chmod(tmp_path, 0o777)
    (tmp_path / "programs").mkdir()
    os.chmod(tmp_path / "programs", 0o777)
    path = compile_cache.enable(tmp_path)
    assert path == str(tmp_path / "programs" / compile_cache.machine_fingerprint())
    assert [p.stat().st_mode & 0o777 for p in (Path(path), Path(path).parent)] == [0o700, 0o700]


def test_programs_are_not_taken_from_where_others_write(no_cache, monkeypatch, tmp_path, caplog):
    (tmp_path / "programs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert compile_cache.enable(tmp_path) == ""
    assert "not kept" in caplog.text and "not a directory of this user" in caplog.text
    monkeypatch.undo()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "programs").symlink_to(tmp_path / "programs")
    assert compile_cache.enable(tmp_path / "linked") == ""
