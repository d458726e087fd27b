import math
from pathlib import Path

import pytest

from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import rules
from jaxmoe.config.engine_config import EngineConfig

NUMERIC = [(n, r) for n, r in rules(EngineConfig).items() if r.kind in ("int", "float")]


@pytest.mark.parametrize("name,rule", NUMERIC, ids=[n for n, _ in NUMERIC])
def test_every_number_has_both_bounds(name, rule):
    assert rule.low is not None and rule.high is not None
    bad = [rule.low - 1, rule.high * 2 + 1, math.nan, math.inf, True, "1", 10**400]
    for value in bad + ([1.5] if rule.kind == "int" else []):
        with pytest.raises(ConfigError, match=f"^{name}: got "):
            EngineConfig(**{name: value})
    assert getattr(EngineConfig(**{name: rule.high}), name) == rule.high


@pytest.mark.parametrize("name", [n for n, r in rules(EngineConfig).items() if r.choices])
def test_choices_are_listed(name):
    rule = rules(EngineConfig)[name]
    with pytest.raises(ConfigError, match=", ".join(rule.choices)):
        EngineConfig(**{name: "nonsense"})


def test_paths():
    assert EngineConfig(model=Path("/a/b")).model == "/a/b"
    assert EngineConfig(cache_dir="").cache_path is None
    assert EngineConfig(cache_dir=None).cache_path is None
    assert EngineConfig(cache_dir="~/x").cache_path == Path.home() / "x"
    with pytest.raises(ConfigError, match="model: got 5"):
        EngineConfig(model=5)


def test_the_effective_options_are_one_line():
    text = EngineConfig(page_size=32).describe()
    assert "page_size=32" in text and "\n" not in text
    assert len(text.split()) == len(rules(EngineConfig))
