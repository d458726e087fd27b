"""The reliability figures in their short form, where a short run can tell something. What is a
matter of speed (R4, R8) or of hours (R2) is tools/reliability's alone; R7 and R12 have tests of
their own besides (tests/weights/test_mutations.py, tests/engine/test_*mixes.py).
"""

import pytest
from reliability.figures import as_json, from_json, markdown
from reliability.main import CHECKS, main

# Their goals are times, which a test must not depend on; tools/reliability runs them.
_timed = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=_timed) for n in ("R1", "R3", "R5", "R6", "R7", "R12")), "R13"],
)
def test_a_figure(name):
    figure = CHECKS[name].run("short")
    print(figure.describe(name))
    assert not figure.failed, figure.describe(name)
    value = as_json({name: figure})
    assert from_json(value) == {name: figure}
    assert figure.title in markdown(value)


@pytest.mark.parametrize("argv", [["--only=R11"], ["--size=0"], ["--form=long"]])
def test_refusals(argv, capsys):
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert info.value.code == 2 and argv[0].split("=")[0] in capsys.readouterr().err
