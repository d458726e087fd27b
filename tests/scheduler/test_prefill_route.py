"""The choice of a prompt's path, by hand."""

from __future__ import annotations

import re

import pytest

from jaxmoe.scheduler.prefill_route import DslpRates, PrefillRoute


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


@pytest.mark.parametrize(
    "host_bytes_per_s, chunked",
    [(1e12, 1e-2), (2.5e11, 2e-2)],  # arithmetic binds; reading all experts for every chunk does
)
def test_estimates_from_rates(host_bytes_per_s, chunked):
    r = PrefillRoute.estimated(
        pass_bytes=600e9,
        copy_bytes_per_s=50e9,
        token_flops=40e9,
        device_flops_per_s=200e12,
        chunk_tokens=100,
        chunk_bytes=500e9,
        host_flops_per_s=4e12,
        host_bytes_per_s=host_bytes_per_s,
        max_tokens=1000,
    )
    assert (r.pass_s, r.streamed_token_s) == (12.0, 4e-4)
    assert r.chunked_token_s == pytest.approx(chunked)


def taken(route: PrefillRoute, tokens: int) -> int:
    """Of the next streamed pass; 0: none."""
    found = route.next_pass(tokens)
    assert found is None or found.path == route.choose(tokens)
    return 0 if found is None else found.tokens


def test_the_faster_way_is_chosen():
    r = route()
    assert [r.choose(n) for n in (1, 1999, 2000, 2001, 20000)] == [
        "chunked",
        "chunked",
        "chunked",
        "slp",
        "slp",
    ]
    assert [taken(r, n) for n in (0, 2000, 2001, 50000)] == [0, 0, 2001, 32768]


def test_a_forced_path_is_taken():
    assert taken(route(forced="slp"), 1) == 1
    assert taken(route(forced="chunked"), 10**6) == 0
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


def both(**changes) -> PrefillRoute:
    """Two devices: half the bus time, half the time a token."""
    return route(dslp=DslpRates(6.5, 2.6e-4, 65536, 2), **{"free_devices": 2, **changes})


@pytest.mark.parametrize(
    "changes, tokens, path, count",
    [
        ({}, 1000, "chunked", 0),
        ({}, 1084, "dslp", 1084),  # half as far as one device
        ({}, 100_000, "dslp", 65536),
        ({"free_devices": 1}, 1084, "chunked", 0),  # the other one is at work
        ({"free_devices": 1}, 2001, "slp", 2001),
        ({"forced": "slp"}, 1, "slp", 1),
        ({"forced": "dslp"}, 1, "dslp", 1),
        ({"forced": "dslp"}, 100_000, "dslp", 65536),
        ({"forced": "chunked"}, 100_000, "chunked", 0),
        ({"pass_s": 5.0}, 1084, "slp", 1084),  # one bus is as fast as both
        ({"pass_s": 5.0}, 12_000, "slp", 12_000),
        ({"pass_s": 5.0}, 14_000, "dslp", 14_000),  # two compute faster
        ({"copy_share": 0.5}, 2000, "chunked", 0),  # 13 s a pass
        ({"copy_share": 0.5}, 2200, "dslp", 2200),
        ({"pass_s": float("inf")}, 1084, "dslp", 1084),  # no ring on one device
        ({"pass_s": float("inf"), "free_devices": 1}, 100_000, "chunked", 0),
    ],
)
def test_several_devices_are_one_more_way(changes, tokens, path, count):
    r = both()
    for name, value in changes.items():
        setattr(r, name, value)
    assert r.choose(tokens) == path
    assert taken(r, tokens) == count


def test_predictions_on_several_devices_are_corrected_by_themselves():
    r = both()
    assert r.predict_s("dslp", 65537) == pytest.approx(65536 * 2.6e-4 + 6.5)
    for _ in range(30):
        r.observe("dslp", 8000, 9.0)  # bound by the buses
    assert r.dslp.pass_s == pytest.approx(9.0, rel=1e-3) and r.dslp.token_s == 2.6e-4
    for _ in range(30):
        r.observe("dslp", 60000, 30.0)  # by computing
    assert r.dslp.token_s == pytest.approx(5e-4, rel=1e-3)
    assert (r.pass_s, r.streamed_token_s) == (12.0, 5e-4)
    assert "(dslp)" in both().describe() and "(slp)" in route().describe()
    some = both()
    some.pass_s = 5.0
    ways = r"from about 1024 tokens streamed \(slp\).*; from about 16384 tokens streamed \(dslp\)"
    assert re.search(ways, some.describe())


def test_a_throttled_pass_is_expected_to_take_longer():
    route = PrefillRoute(1.0, 1e-4, 1e-3, 10_000)
    assert route.choose(2000) == "slp" and route.predict_s("slp", 2000) == 1.0
    route.copy_share = 0.2
    assert route.choose(2000) == "chunked" and route.predict_s("slp", 2000) == 5.0
    assert route.choose(6000) == "slp"
