import gc
import signal
import sys
import time

import pytest

from jaxmoe.cli import interrupt


@pytest.fixture
def default_sigint():
    """Whatever an earlier test of this process made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_keyboard_interrupt_that_python_drops_comes_again(default_sigint):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        raise KeyboardInterrupt

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupt.kept():
        gc.callbacks.append(callback)
        gc.collect()  # drops it
        time.sleep(30)
        pytest.fail("slept to its end")
    assert sys.unraisablehook is before


def test_other_dropped_exceptions_are_reported_as_before(monkeypatch):
    class Loud:
        def __del__(self):
            raise ValueError("from __del__")

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: seen.append(str(u.exc_value)))
    with interrupt.kept():
        Loud()
    assert seen == ["from __del__"]
