"""When an engine counts as hanging: work pending, no step, for long enough."""

import pytest

from jaxmoe.engine.pulse import Pulse
from jaxmoe.engine.watchdog import Patience, Watchdog


def at(dog, now, steps=0, pending=True, compiling=False, longest=0.0, cpu=None):
    """cpu: of the process so far; by default it works all the time."""
    return dog.hung(
        now,
        pending=pending,
        steps=steps,
        compiling=compiling,
        longest_step_s=longest,
        cpu_s=now if cpu is None else cpu,
    )


def test_a_compiler_that_stands_still_hangs():
    dog = Watchdog(Patience(least_s=10), 0.0)
    assert not at(dog, 0.0, compiling=True, cpu=5.0)
    for now in range(1, 100):
        assert not at(dog, now, compiling=True, cpu=5.0 + now / 2)
    assert not at(dog, 109.0, compiling=True, cpu=54.5)
    assert at(dog, 109.1, compiling=True, cpu=54.5)


@pytest.mark.parametrize(
    "longest,compiling,limit",
    [(0.0, False, 60), (5.9, False, 60), (30, False, 300), (1, True, 1800)],
)
def test_the_limit_grows_with_the_longest_step(longest, compiling, limit):
    dog = Watchdog(Patience(), 0.0)
    assert not at(dog, 0.0, compiling=compiling, longest=longest)
    assert not at(dog, limit, compiling=compiling, longest=longest)
    assert at(dog, limit + 0.1, compiling=compiling, longest=longest)


def test_idle_time_does_not_count_and_every_step_begins_anew():
    dog = Watchdog(Patience(least_s=10), 0.0)
    assert not at(dog, 1000.0, pending=False)
    assert not at(dog, 1009.0)
    assert not at(dog, 1009.5, steps=1)
    assert not at(dog, 1019.0, steps=1)
    assert not at(dog, 1019.2, steps=1, compiling=True)
    assert not at(dog, 1200.0, steps=1, compiling=True)
    assert not at(dog, 1201.0, steps=1)  # compiled: the step itself begins
    assert at(dog, 1211.5, steps=1) and dog.silent_s(1211.5) == 10.5


def test_a_pulse_is_read_as_it_was_written():
    pulse = Pulse.create()
    other = Pulse(pulse.fd)
    assert (other.steps, other.compiling, other.stats(["a"])) == (0, False, {})
    pulse.beat(1.5)
    pulse.set_stats({"a": 2.0, "b": 3.0})
    pulse.set_compiling(True)
    assert (other.steps, other.longest_step_s, other.compiling) == (1, 1.5, True)
    assert other.stats(["a", "b"]) == {"a": 2.0, "b": 3.0} and other.stats(["a"]) == {}
    other._values.release()
    other._memory.close()
    pulse.close()
