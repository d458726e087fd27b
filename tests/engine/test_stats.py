"""What the watchdog's patience goes by."""

from jaxmoe.engine.stats import Stats
from jaxmoe.scheduler.scheduler import StepPlan


def test_steps_that_compiled_lengthen_patience_but_are_no_figure():
    """The first step of a shape is the one that compiles: a machine on which it takes minutes
    must not be called hung at the second.
    """
    stats = Stats()
    stats.note_step(StepPlan("prefill", ()), 90.0, {}, compiled=True)
    stats.note_step(StepPlan("decode", ()), 2.0, {}, compiled=False)
    assert stats.longest_step_s == 90.0
    assert stats._totals["longest_step_seconds"] == 2.0
