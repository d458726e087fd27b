"""The reliability figures in their short form, where a short run can tell something. What is a
matter of speed (R4, R8) or of hours (R2) is tools/reliability's alone. R12's mixes have tests of
their own in the ordinary run besides (tests/engine/test_*mixes.py), without the engine's restarts.
"""

import pytest
from reliability.figures import as_json, from_json, markdown
from reliability.main import CHECKS, main

# Their goals are times, which a test must not depend on, or they take half a minute.
_slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=_slow) for n in ("R1", "R3", "R5", "R6", "R12")), "R7", "R13"],
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
