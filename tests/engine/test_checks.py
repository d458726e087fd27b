"""What is said about a request before any engine has it."""

import pytest

from jaxmoe.common.errors import RequestError
from jaxmoe.engine.checks import MAX_LOGPROB_ENTRIES, resolve_max_tokens
from jaxmoe.sampling_params import SamplingParams

LONG = 1 << 20


def resolve(num_prompt, default=None, **params):
    params = SamplingParams(**params)
    return resolve_max_tokens(num_prompt, params, max_model_len=LONG, default=default)


@pytest.mark.parametrize(
    "num_prompt,params",
    [
        (1, dict(logprobs=20, max_tokens=190_000)),
        (1, dict(logprobs=0, max_tokens=LONG - 1)),
        (190_000, dict(prompt_logprobs=20, max_tokens=9)),
        (1, dict(max_tokens=LONG - 1, n=128)),
    ],
)
def test_answers_that_fit(num_prompt, params):
    assert resolve(num_prompt, **params) == params["max_tokens"]


@pytest.mark.parametrize(
    "num_prompt,params,words",
    [
        (1, dict(logprobs=0, max_tokens=50_000, n=128), r"n \(128\) x 50000 tokens x \(0 \+ 1\)"),
        (1, dict(logprobs=20, max_tokens=220_000), r"220000 tokens x \(20 \+ 1\)"),
        (220_000, dict(prompt_logprobs=20), r"220000 prompt tokens x \(20 \+ 1\)"),
        (190_000, dict(prompt_logprobs=20, logprobs=20, max_tokens=20_000), "lower logprobs"),
    ],
)
def test_more_log_probabilities_than_an_answer_holds_are_refused(num_prompt, params, words):
    with pytest.raises(RequestError, match=words):
        resolve(num_prompt, **params)


def test_a_longest_output_that_nobody_named_gives_way():
    assert resolve(1, logprobs=20) == MAX_LOGPROB_ENTRIES // 21
    assert resolve(1, logprobs=20, default=100) == 100
    assert resolve(1) == LONG - 1
