import json
import math

import pytest

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.generation import GenerationDefaults
from jaxmoe.sampling_params import SamplingParams


def read(tmp_path, values):
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "generation_config.json").write_text(text)
    return GenerationDefaults.from_dir(tmp_path)


def test_no_file_is_the_plain_defaults(tmp_path):
    assert GenerationDefaults.from_dir(tmp_path) == GenerationDefaults(SamplingParams(), None, None)


def test_qwen(tmp_path):
    got = read(
        tmp_path,
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "eos_token_id": [151645, 151643],
            "pad_token_id": 151643,
            "max_new_tokens": 2048,
            "transformers_version": "4.51.0",
        },
    )
    assert got.params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert got.eos_token_ids == (151645, 151643) and got.max_tokens == 2048


def test_do_sample_false_is_ignored_and_null_is_not_given(tmp_path):
    got = read(tmp_path, {"do_sample": False, "temperature": None, "eos_token_id": 1})
    assert got.params == SamplingParams() and got.eos_token_ids == (1,)


@pytest.mark.parametrize(
    "values,words",
    [
        ("{", "not valid JSON"),
        ([1], "holds a list"),
        ({"temperature": -1}, "generation_config.json: temperature: got -1"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"max_new_tokens": "many"}, "max_tokens: got 'many'"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": []}, "eos_token_id is \\[\\]"),
        ({"eos_token_id": [True]}, "eos_token_id is \\[True\\]"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, values, words):
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, values)
