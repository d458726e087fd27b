"""The choice of a prompt's path, by hand."""

from __future__ import annotations

import pytest

from jaxmoe.scheduler.prefill_route import PrefillRoute


def route(**changes) -> PrefillRoute:
    figures = {"pass_s": 12.0, "streamed_token_s": 5e-4, "chunked_token_s": 6e-3}
    return PrefillRoute(**figures, max_tokens=32768, **changes)


@pytest.mark.parametrize(
    "path, tokens, seconds",
    [
        ("chunked", 1000, 6.0),
        ("slp", 1, 12.0),  # all experts pass whatever the length
        ("slp", 24000, 12.0),
        ("slp", 32768, 16.384),
        ("slp", 32769, 16.384 + 12.0),  # two passes
    ],
)
def test_predictions(path, tokens, seconds):
    assert route().predict_s(path, tokens) == pytest.approx(seconds)


def test_the_faster_way_is_chosen():
    r = route()
    assert [r.choose(n) for n in (1, 1999, 2000, 2001, 20000)] == [
        "chunked",
        "chunked",
        "chunked",
        "slp",
        "slp",
    ]
    assert r.streams(2000) == 0
    assert r.streams(2001) == 2001
    assert r.streams(50000) == 32768
    assert r.streams(0) == 0


def test_a_forced_path_is_taken():
    assert route(forced="slp").streams(1) == 1
    assert route(forced="chunked").streams(10**6) == 0
    assert "always slp" in route(forced="slp").describe()


def test_observations_move_the_crossing():
    r = route()
    for _ in range(30):
        r.observe("chunked", 512, 512 * 2e-3)
    assert r.chunked_token_s == pytest.approx(2e-3, rel=1e-3)
    assert r.choose(4000) == "chunked"
    for _ in range(30):
        r.observe("slp", 8000, 6.0)
    assert r.pass_s == pytest.approx(6.0, rel=1e-3)
    assert r.choose(4000) == "slp"
    for _ in range(30):
        r.observe("slp", 30000, 30.0)
    assert r.streamed_token_s == pytest.approx(1e-3, rel=1e-3)
    r.observe("slp", 0, 1.0)
    r.observe("chunked", 10, 0.0)
    assert "from about 4096 tokens" in r.describe()


def test_a_throttled_pass_is_expected_to_take_longer():
    route = PrefillRoute(1.0, 1e-4, 1e-3, 10_000)
    assert route.choose(2000) == "slp" and route.predict_s("slp", 2000) == 1.0
    route.least_pass_s = 5.0
    assert route.choose(2000) == "chunked" and route.predict_s("slp", 2000) == 5.0
    assert route.choose(6000) == "slp"
