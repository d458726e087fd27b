"""The second turn of a chat with a long first one: what is computed is what is new."""

from reliability.client import parse_metrics
from support.front import run, serving

CHAT = "/v1/chat/completions"
PAGE = 4  # of the fake engine
FIRST = "x" * 4096  # a token a character


async def counted(f):
    return parse_metrics((await f.client.get("/metrics")).text)


def test_turn_two_computes_the_new_tokens_only():
    async def test():
        async with serving(lambda prompt: b"an answer", max_model_len=5000) as f:
            messages = [{"role": "user", "content": FIRST}]
            before = await counted(f)
            first = (await f.post(CHAT, {"messages": messages, "temperature": 0})).json()
            between = await counted(f)
            answer = first["choices"][0]["message"]
            messages += [
                {"role": "assistant", "content": answer["content"]},
                {"role": "user", "content": "and then?"},
            ]
            second = (await f.post(CHAT, {"messages": messages, "temperature": 0})).json()
            after = await counted(f)
            computed = 'step_tokens_total{kind="prefill"}'
            one, two = (first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"])
            assert one > 4096
            assert between[computed] - before[computed] == one
            # Its answer and the new message, and what of the first turn filled no whole page.
            new = two - one
            assert new < 40
            assert new <= after[computed] - between[computed] <= new + PAGE
            cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == two - (after[computed] - between[computed]) >= 4096 - PAGE

    run(test())
