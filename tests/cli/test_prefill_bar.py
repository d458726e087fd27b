"""The bar of long prompts: what it says, and when it is silent."""

from __future__ import annotations

import pytest

from jaxmoe.cli.prefill_bar import PrefillBar
from jaxmoe.engine.async_engine import PrefillProgress


def told(bar: PrefillBar) -> None:
    bar(PrefillProgress("a", 0, 4000, 7, 61, 8.4))
    bar(PrefillProgress("b", 500, 1000, left_s=2.0))
    bar(PrefillProgress("a", 4000, 4000))
    bar(PrefillProgress("b", 1000, 1000))


def test_it_says_tokens_layer_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with PrefillBar(5000, show=True, delay_s=0) as bar:
        bar._bar.mininterval = 0
        told(bar)
        assert bar._bar.n == 5000 and bar._bar.disable  # closed: the text follows
    err = capsys.readouterr().err
    assert "500/5000 tokens" in err and "2 s left" in err, err


@pytest.mark.parametrize("options", [{"show": False}, {"show": None}, {"show": True}])
def test_it_is_silent(options, capsys: pytest.CaptureFixture[str]):
    """Where it is not wanted, where nobody sees it, and for what takes no time."""
    with PrefillBar(5000, **options) as bar:
        told(bar)
    assert capsys.readouterr().err.strip() == ""
