"""/v1/completions: prompts in every form, echo, log probabilities, streams."""

import pytest
from support.front import run, serving

PATH = "/v1/completions"


def test_prompts_in_every_form():
    async def test():
        async with serving(lambda prompt: prompt.upper()) as f:
            cases = [
                ("ab", ["AB"]),
                (["ab", "cd"], ["AB", "CD"]),
                ([97, 98], ["AB"]),
                ([[97, 98], [99]], ["AB", "C"]),
            ]
            for prompt, texts in cases:
                r = await f.post(PATH, {"prompt": prompt})
                body = r.json()
                assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
                assert [c["text"] for c in body["choices"]] == texts
                assert [c["index"] for c in body["choices"]] == list(range(len(texts)))
            many = (await f.post(PATH, {"prompt": ["ab", "cd"], "n": 2})).json()
            assert [c["text"] for c in many["choices"]] == ["AB", "AB", "CD", "CD"]
            assert many["usage"]["prompt_tokens"] == 4
            stream = {"prompt": ["ab", "cd"], "n": 2, "stream": True}
            events = [e for _, e in (await f.events(PATH, stream))[:-1]]
            texts = ["", "", "", ""]
            for e in events:
                texts[e["choices"][0]["index"]] += e["choices"][0]["text"]
            assert texts == ["AB", "AB", "CD", "CD"]
            reasons = [e["choices"][0]["finish_reason"] for e in events]
            assert sum(r is not None for r in reasons) == 4

    run(test())


def test_sixteen_tokens_by_default():
    async def test():
        async with serving(lambda prompt: b"x" * 100) as f:
            choice = (await f.post(PATH, {"prompt": "a"})).json()["choices"][0]
            assert choice["text"] == "x" * 16 and choice["finish_reason"] == "length"

    run(test())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_scores_the_prompt(stream, max_tokens):
    """As evaluation harnesses ask for it: the prompt's tokens with their log probabilities."""

    async def test():
        async with serving(lambda prompt: b"xyz") as f:
            body = {"prompt": "abc", "max_tokens": max_tokens, "echo": True, "logprobs": 1}
            if stream:
                events = await f.events(PATH, {**body, "stream": True})
                parts = [e["choices"][0] for _, e in events[:-1]]
                text = "".join(p["text"] for p in parts)
                joined = {k: [] for k in ("tokens", "token_logprobs", "top_logprobs")}
                for p in parts:
                    for k in joined:
                        joined[k] += p["logprobs"][k]
                assert parts[-1]["finish_reason"] == "length"
            else:
                answer = (await f.post(PATH, body)).json()
                choice = answer["choices"][0]
                text, joined = choice["text"], choice["logprobs"]
                assert choice["finish_reason"] == "length"
                assert answer["usage"]["completion_tokens"] == max_tokens
                assert joined["text_offset"] == list(range(3 + max_tokens))
            assert text == "abc" + "xyz"[:max_tokens] == "".join(joined["tokens"])
            # The fake engine's log probability of a prompt's token is minus its position.
            assert joined["token_logprobs"] == [None, -1.0, -2.0, -0.5, -0.5][: 3 + max_tokens]
            assert joined["top_logprobs"][0] is None
            assert joined["top_logprobs"][1] == {"b": -1.0}

    run(test())


def test_prompt_logprobs_beside_the_text():
    async def test():
        async with serving(lambda prompt: b"x") as f:
            body = {"prompt": "ab", "prompt_logprobs": 2, "return_token_ids": True}
            choice = (await f.post(PATH, body)).json()["choices"][0]
            first, second = choice["prompt_logprobs"]
            assert first is None and second["98"] == {"logprob": -1.0, "decoded_token": "b"}
            assert choice["text"] == "x" and choice["prompt_token_ids"] == [97, 98]

    run(test())


@pytest.mark.parametrize(
    "change, param",
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt[0]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [999]}, None),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"min_tokens": 20}, "min_tokens"),
    ],
)
def test_what_is_wrong_is_named(change, param):
    async def test():
        async with serving() as f:
            r = await f.post(PATH, {"prompt": "a", **change})
            error = r.json()["error"]
            assert r.status_code == 400, r.text
            if param is not None:
                assert (error["param"] or "").startswith(param), error

    run(test())


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}])
def test_a_stream_has_every_token_id(more):
    """Also those of steps without text: parts of a character, the token that ends the answer."""

    async def test():
        async with serving(lambda prompt: "né€".encode()) as f:
            body = {"prompt": "ab", "return_token_ids": True, **more}
            whole = (await f.post(PATH, body)).json()["choices"][0]
            events = await f.events(PATH, {**body, "stream": True})
            parts = [e["choices"][0] for _, e in events[:-1]]
            assert "".join(p["text"] for p in parts) == whole["text"] == "né€"
            assert [i for p in parts for i in p["token_ids"]] == whole["token_ids"]
            assert len(whole["token_ids"]) == 7
            assert parts[0]["prompt_token_ids"] == whole["prompt_token_ids"] == [97, 98]
            assert not any("prompt_token_ids" in p for p in parts[1:])
        async with serving(lambda prompt: "é".encode()) as f:  # no text in the first step
            events = await f.events(PATH, {**body, "stream": True})
            assert events[0][1]["choices"][0]["prompt_token_ids"] == [97, 98]

    run(test())
