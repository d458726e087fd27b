import dataclasses
import json
import math

import numpy as np
import pytest

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import rules
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.structured_output import StructuredOutput

NUMERIC = [(n, r) for n, r in rules(SamplingParams).items() if r.kind in ("int", "float")]


@pytest.mark.parametrize("name,rule", NUMERIC, ids=[n for n, _ in NUMERIC])
def test_every_number_has_both_bounds_and_refuses_what_is_no_number(name, rule):
    assert rule.low is not None and rule.high is not None
    step = 1 if rule.kind == "int" else 1e-3
    bad = [rule.low - step, rule.high + max(1, rule.high * 1e-3), math.nan, math.inf, -math.inf]
    bad += [True, "1", [1], 10**400, b"1"]
    if rule.kind == "int":
        bad += [1.5, 1.0]
    if rule.low_open:
        bad.append(rule.low)
    if not rule.optional:
        bad.append(None)
    for value in bad:
        with pytest.raises(RequestError, match=f"^{name}: got "):
            SamplingParams(**{name: value})
    for value in [rule.high] + ([] if rule.low_open else [rule.low]):
        extra = {"max_tokens": value} if name == "min_tokens" and value else {}
        SamplingParams(**{name: value}, **extra)


def test_numbers_become_plain_python_numbers():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1)
    assert type(params.temperature) is float and params.temperature == 0.5
    assert type(params.top_k) is int and type(params.top_p) is float


@pytest.mark.parametrize(
    "given,words",
    [
        (dict(stop=["a"] * 17), "stop: got 17 strings, wanted at most 16"),
        (dict(stop=[""]), "stop: got ''"),
        (dict(stop=[1]), "stop: got 1"),
        (dict(stop=5), "stop: got 5"),
        (dict(stop=["x" * 2000]), "1 to 1024"),
        (dict(stop_token_ids="12"), "stop_token_ids"),
        (dict(stop_token_ids=[-1]), "stop_token_ids: got -1"),
        (dict(stop_token_ids=[True]), "stop_token_ids: got True"),
        (dict(stop_token_ids=range(200)), "got 200 ids"),
        (dict(logit_bias={1: 101.0}), "logit_bias: got 101.0"),
        (dict(logit_bias={1: math.nan}), "logit_bias: got nan"),
        (dict(logit_bias={"a": 1.0}), "logit_bias: got 'a'"),
        (dict(logit_bias=3), "logit_bias: got 3"),
        (dict(logit_bias={i: 0 for i in range(2000)}), "got 2000 entries"),
        (dict(ignore_eos=1), "ignore_eos: got 1, wanted true or false"),
        (dict(min_tokens=5, max_tokens=4), "min_tokens: got 5, wanted at most max_tokens"),
    ],
)
def test_refusals_name_the_field(given, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**given)


def test_lists_are_copied_and_single_stop_is_one_stop():
    stops = ["a", "b"]
    params = SamplingParams(stop=stops, logit_bias={7: -1, 3: 2})
    stops.append("c")
    assert params.stop == ("a", "b")
    assert params.logit_bias == ((3, 2.0), (7, -1.0))
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert dataclasses.replace(params, n=2).logit_bias == params.logit_bias
    hash(params)


def test_of_replaces_fields_and_names_the_nearest_of_an_unknown_one():
    base = SamplingParams(temperature=0.6)
    assert SamplingParams.of({"top_p": 0.9}, base) == SamplingParams(temperature=0.6, top_p=0.9)
    with pytest.raises(RequestError, match="'temprature'.*did you mean 'temperature'"):
        SamplingParams.of({"temprature": 1})


@pytest.mark.parametrize(
    "given,adjusts",
    [({}, False), (dict(temperature=0.3, top_k=4), False), (dict(repetition_penalty=1.1), True)]
    + [(dict(logit_bias={1: 1}), True), (dict(min_tokens=1), True)],
)
def test_adjusts_logits(given, adjusts):
    assert SamplingParams(**given).adjusts_logits is adjusts


def test_structured_output_is_part_of_it_and_crosses_as_plain_json():
    spec = StructuredOutput(kind="regex", value="[ab]", thoughts=("<t>", "</t>"))
    params = SamplingParams.of({"structured": spec, "seed": 2})
    assert params.structured == spec and hash(params) == hash(dataclasses.replace(params))
    wire = json.loads(json.dumps(dataclasses.asdict(params)))
    assert SamplingParams(**wire) == params
    with pytest.raises(RequestError, match="structured output: got 3"):
        SamplingParams(structured=3)
