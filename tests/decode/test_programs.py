"""Each program is compiled once, and nobody waits for any but the one that it needs."""

import threading

import pytest

from jaxmoe.decode.programs import Programs


class Compiling(threading.Thread):
    """Gets `key` in a thread whose compilation lasts until `end`, and fails with `error`."""

    def __init__(self, programs, key, error=None):
        super().__init__()
        self.programs, self.key, self.error = programs, key, error
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.got = None

    def compile(self):
        self.begun.set()
        assert self.may_end.wait(10)
        if self.error is not None:
            raise self.error
        return f"{self.key} by {self.name}"

    def run(self):
        try:
            self.got = self.programs.get(self.key, self.compile)
        except BaseException as e:
            self.got = e

    def end(self):
        self.may_end.set()
        self.join(10)


def begin(programs, key, error=None):
    thread = Compiling(programs, key, error)
    thread.start()
    assert thread.begun.wait(10)
    return thread


def test_another_program_is_not_waited_for():
    programs = Programs()
    slow = begin(programs, "a")
    assert programs.get("b", lambda: "b") == "b"
    assert "b" in programs and "a" not in programs and len(programs) == 1
    slow.end()
    assert "a" in programs and len(programs) == 2


def test_the_same_program_is_waited_for_and_compiled_once():
    programs = Programs()
    first = begin(programs, "a")
    second = Compiling(programs, "a")
    second.start()
    assert not second.begun.wait(0.05)
    first.end()
    second.join(10)
    assert second.got == first.got and not second.begun.is_set()
    programs.clear()
    assert "a" not in programs and len(programs) == 0


@pytest.mark.parametrize("error", [ValueError("no memory"), KeyboardInterrupt()])
def test_who_waited_for_a_failure_compiles_itself(error):
    programs = Programs()
    first, second = begin(programs, "a", error), Compiling(programs, "a")
    second.start()
    assert not second.begun.wait(0.05)
    first.end()
    second.end()
    assert first.got is error and second.begun.is_set()
    assert second.got == f"a by {second.name}" and "a" in programs
