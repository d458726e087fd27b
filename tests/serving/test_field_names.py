"""What the client sent is what errors name, and every field has a bound of its kind."""

import pytest
from support.front import run, serving

from jaxmoe.serving.fields import TABLE, docs_table

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TALK = {"messages": [{"role": "user", "content": "hi"}]}
LEAST = {
    CHAT: TALK,
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {**TALK, "max_tokens": 5},
    "/v1/messages/count_tokens": TALK,
    "/tokenize": TALK,
}
BOUNDS = {
    "string": ("maxLength",),
    "array": ("maxItems",),
    "object": ("maxProperties",),
    "integer": ("maximum",),
    "number": ("maximum",),
    "boolean": (),
    "null": (),
}


def unbounded(schema):
    if "anyOf" in schema:
        return [w for s in schema["anyOf"] for w in unbounded(s)]
    if "enum" in schema:
        return []
    if "type" not in schema:
        return ["no type"]
    return [w for w in BOUNDS[schema["type"]] if w not in schema]


@pytest.mark.parametrize("field", TABLE, ids=lambda f: f"{f.name}-{f.on[0]}")
def test_every_field_has_a_bound_of_its_kind(field):
    assert unbounded(field.json_schema) == []
    assert "see OpenAPI" not in docs_table()


def test_names_that_the_server_gives_templates_are_refused():
    names = (
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "response_format",
    )

    async def test():
        async with serving() as f:
            for path, body in LEAST.items():
                for name in names:
                    for value in (None, True, "x"):
                        r = await f.post(path, {**body, "chat_template_kwargs": {name: value}})
                        assert r.status_code == 400, (path, name, r.text)
                        param = f"chat_template_kwargs.{name}"
                        error = r.json()["error"]
                        assert param in error["message"]
                        assert error.get("param", param) == param

    run(test())


SCHEMA = {"type": "json_schema", "schema": {"type": "no such type"}, "name": "mine"}
LONG = "x" * 401


@pytest.mark.parametrize(
    "path, change, param",
    [
        (CHAT, {"structured_outputs": {"regex": "(((("}}, "structured_outputs.regex"),
        (CHAT, {"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
         "response_format.json_schema.schema"),
        (COMPLETIONS, {"structured_outputs": {"regex": "(((("}}, "structured_outputs.regex"),
        ("/v1/responses", {"text": {"format": SCHEMA}}, "text.format.schema"),
        (CHAT, {"guided_regex": "a"}, "guided_regex"),
        (CHAT, {"max_tokens": 4000}, "messages"),
        ("/v1/responses", {"input": LONG}, "input"),
        (COMPLETIONS, {"prompt": LONG}, "prompt"),
        (COMPLETIONS, {"prompt": [999]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
        (COMPLETIONS, {"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/responses", {"reasoning": {"effort": "bogus"}}, "reasoning.effort"),
    ],
)  # fmt: skip
def test_errors_name_what_was_sent(path, change, param):
    async def test():
        async with serving() as f:
            r = await f.post(path, {**LEAST.get(path, {"prompt": "a"}), **change})
            error = r.json()["error"]
            assert r.status_code == 400 and error["param"] == param, r.text
            assert param in error["message"]

    run(test())


def test_what_comes_back():
    async def test():
        async with serving(lambda prompt: b"x") as f:
            body = (await f.post(CHAT, {**TALK, "prompt_logprobs": 1})).json()
            assert len(body["prompt_logprobs"]) == 7 and body["prompt_logprobs"][0] is None
            include = {"include": ["message.output_text.logprobs"]}
            body = (await f.post("/v1/responses", {"input": "hi", **include})).json()
            assert body["output"][0]["content"][0]["logprobs"][0]["token"] == "x"
            ask = {"prompt": "a", "logprobs": 0}
            (first, *_) = (await f.post(COMPLETIONS, ask)).json()["choices"][0]["logprobs"][
                "top_logprobs"
            ]
            assert list(first) == ["x"]
            thinking = {"type": "enabled", "budget_tokens": -5}
            r = await f.post("/v1/messages", {**LEAST["/v1/messages"], "thinking": thinking})
            assert r.status_code == 400 and "thinking.budget_tokens" in r.text

    run(test())
