"""The table of fields: validation, OpenAPI and docs say the same."""

import math

import pytest

from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import ENDPOINTS, TABLE, Checker, docs_table, fields_of
from jaxmoe.serving.openapi import body_schema, openapi

LEAST = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "responses": {"input": "hi"},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    "count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "tokenize": {"prompt": "hi"},
    "detokenize": {"tokens": [1]},
}
NUMBERS = [
    (e, f, name)
    for e in ENDPOINTS
    for f in fields_of(e)
    if f.rule.kind in ("int", "float") and f.effect == "used"
    for name in (f.name, *f.aliases)
]


def check(endpoint, **change):
    return Checker().check(endpoint, {**LEAST[endpoint], **change})


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_least_body_passes(endpoint):
    body = check(endpoint)
    assert {f.name for f in fields_of(endpoint)} == set(body.values)
    SamplingParams.of(body.sampling())
    for name in LEAST[endpoint]:
        fields = [f for f in fields_of(endpoint) if f.name == name]
        if fields[0].required:
            with pytest.raises(ApiError, match=f"{name}: ") as e:
                Checker().check(endpoint, {k: v for k, v in LEAST[endpoint].items() if k != name})
            assert e.value.param == name and e.value.status == 400


@pytest.mark.parametrize("endpoint, field, name", NUMBERS, ids=[f"{e}-{n}" for e, _, n in NUMBERS])
def test_numbers_have_both_bounds(endpoint, field, name):
    low, high = field.rule.low, field.rule.high
    assert low is not None and high is not None
    step = 1 if field.rule.kind == "int" else 1e-6 * max(abs(low), 1.0)
    good = [high, (low + high) // 2 if field.rule.kind == "int" else (low + high) / 2]
    good += [] if field.rule.low_open else [low]
    for value in good:
        assert check(endpoint, **{name: value})[field.name] == value
    bad = [low - step, high + max(step, abs(high) * 1e-9), math.nan, math.inf, -math.inf]
    bad += [True, "1", [1], {}, 10**400]
    bad += [low] if field.rule.low_open else []
    bad += [2**63] if high < 2**63 else [2**64]
    bad += [high - 0.5] if field.rule.kind == "int" else []
    for value in bad:
        with pytest.raises(ApiError) as e:
            check(endpoint, **{name: value})
        assert e.value.status == 400 and e.value.param == name and str(e.value).startswith(name)


def test_sampling_parameters_are_all_reachable_and_have_their_own_bounds():
    reachable = {f.fills for f in fields_of("completions")} - {None}
    not_fields = {"prompt_logprobs", "structured"}  # set from other fields
    assert reachable | not_fields >= {f.name for f in SamplingParams.__dataclass_fields__.values()}


def test_null_is_not_given_and_aliases_are_the_field():
    body = check("chat", temperature=None, max_completion_tokens=7, stop=None)
    assert body["temperature"] is None and body.sampling() == {"max_tokens": 7}
    with pytest.raises(ApiError, match="max_completion_tokens"):
        check("chat", max_tokens=6, max_completion_tokens=7)


@pytest.mark.parametrize("body", [None, [], "x", 1, True])
def test_a_body_is_an_object(body):
    with pytest.raises(ApiError, match="JSON object"):
        Checker().check("chat", body)


def test_unknown_fields_are_logged_once_and_not_for_ever(caplog):
    checker = Checker()
    for i in range(1000):
        checker.check("chat", {**LEAST["chat"], f"made_up_{i}": 1, "same": 2})
    messages = [m for m in caplog.messages if "unknown field" in m]
    assert sum("'same'" in m for m in messages) == 1 and len(messages) == Checker.MAX_LOGGED


def test_refused_fields_may_ask_for_nothing():
    for endpoint in ENDPOINTS:
        for field in fields_of(endpoint):
            if field.effect != "refused":
                continue
            for value in field.harmless:
                check(endpoint, **{field.name: value})
            with pytest.raises(ApiError, match=field.name) as e:
                check(endpoint, **{field.name: {"a": 1}})
            assert e.value.code == "unsupported_parameter"


def test_openapi_has_every_field_with_its_bounds():
    paths = openapi(has_keys=True)["paths"]
    for endpoint, path in ENDPOINTS.items():
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == body_schema(endpoint)
        for field in fields_of(endpoint):
            for name in (field.name, *field.aliases):
                assert schema["properties"][name]["description"]
            assert (field.name in schema["required"]) == field.required
    top_p = body_schema("chat")["properties"]["top_p"]["anyOf"][0]
    assert top_p == {"type": "number", "exclusiveMinimum": 0.0, "maximum": 1.0}


def test_the_docs_table_has_every_field():
    table = docs_table()
    assert all(f"`{f.name}`" in table for f in TABLE)
    assert len(table.splitlines()) == len(TABLE) + 2
