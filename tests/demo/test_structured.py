"""The demo model under grammars: valid JSON at temperature 1, whatever the seed."""

import json

import pytest

import jaxmoe
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.structured_output import StructuredOutput
from jaxmoe.text.tool_calls import TOOL_FORMATS, make_tool_parser
from jaxmoe.text.tool_grammar import tool_grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "king": {"type": "string", "maxLength": 20},
        "years": {"type": "integer", "minimum": 1, "maximum": 60},
        "sons": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 10}},
                "required": ["name"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 3,
        },
        "good": {"type": ["boolean", "null"]},
    },
    "required": ["king", "years", "sons", "good"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "anoint",
            "parameters": {
                "type": "object",
                "properties": {"who": {"type": "string", "enum": ["Saul", "David"]}},
                "required": ["who"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def llm():
    with jaxmoe.LLM(max_num_seqs=4) as demo:
        yield demo


def test_json_under_a_schema_for_many_seeds(llm):
    spec = StructuredOutput.json_schema(SCHEMA)
    texts = []
    for seed in range(8):
        params = SamplingParams(temperature=1.0, seed=seed, n=4, max_tokens=160, structured=spec)
        for out in llm.generate("And the king begat sons", params)[0].outputs:
            assert out.finish_reason == "stop", out
            value = json.loads(out.text)
            assert list(value) == list(SCHEMA["properties"])
            assert len(value["king"]) <= 20 and 1 <= value["years"] <= 60
            assert 1 <= len(value["sons"]) <= 3 and all(set(s) == {"name"} for s in value["sons"])
            assert value["good"] in (True, False, None)
            texts.append(out.text)
    assert len(set(texts)) > 25


FREE = [
    SamplingParams(temperature=0, max_tokens=20, logprobs=2),
    SamplingParams(seed=3, max_tokens=20, logprobs=0),
    SamplingParams(seed=4, top_p=0.9, top_k=50, min_p=0.01, max_tokens=20, logprobs=1),
]


def test_other_rows_of_a_batch_have_the_same_tokens_and_logprobs(llm, monkeypatch):
    step, masked = llm._started.step, []
    program = step._program

    def spy(variant, inputs):
        masked.append(inputs.masks is not None)
        return program(variant, inputs)

    monkeypatch.setattr(step, "_program", spy)

    def run(*more):
        masked.clear()
        prompts = ["The sea", "And he said unto the king", "Emma"] + ["In the land"] * len(more)
        outputs = [o.outputs[0] for o in llm.generate(prompts, [*FREE, *more])]
        return [(o.token_ids, o.logprobs) for o in outputs[:3]], [o.text for o in outputs[3:]]

    alone, _ = run()
    assert not any(masked), "a step that needs no mask is the program without"
    spec = StructuredOutput.regex("[a-z]{9}")
    mixed, (text,) = run(SamplingParams(seed=9, structured=spec))
    assert mixed == alone and len(text) == 9
    assert any(masked) and not all(masked)


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_a_forced_tool_call(llm, format):
    spec = tool_grammar(format, TOOLS, "required", llm.tokenizer.token_id, parallel=False)
    params = SamplingParams(
        temperature=1.0, seed=7, max_tokens=160, structured=spec, skip_special_tokens=False
    )
    (out,) = llm.generate("Samuel took a vial of oil", params)[0].outputs
    assert out.finish_reason == "stop"
    parser = make_tool_parser(format, TOOLS)
    first, last = parser.feed(out.text), parser.finish()
    assert first.content + last.content == ""
    assert first.calls[0].name == "anoint"
    arguments = "".join(c.arguments for d in (first, last) for c in d.calls)
    assert json.loads(arguments)["who"] in ("Saul", "David")
