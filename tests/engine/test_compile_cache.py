"""Compiled programs are kept by the kind of machine they were compiled for."""

import builtins
import importlib.metadata
import io

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
