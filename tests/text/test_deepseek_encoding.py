"""Prompts of DeepSeek-V3.2 and V4, which have no template: held to what the references write.

fixtures/deepseek_prompts.json names each one's reference: DeepSeek's library for its prompts
(deepseek-recipe on PyPI), or the program that ships with the checkpoints, for what the library
does not know.
"""

import json
import random
from pathlib import Path

import pytest

from jaxmoe.common.errors import RequestError
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.deepseek_encoding import DeepSeekV4Encoding, DeepSeekV32Encoding
from jaxmoe.text.deepseek_texts import EFFORTS_FIRST

FIXTURES = Path(__file__).parent / "fixtures"
CASES = json.loads((FIXTURES / "deepseek_prompts.json").read_text(encoding="utf-8"))
V4, V32 = ChatTemplate(DeepSeekV4Encoding()), ChatTemplate(DeepSeekV32Encoding())
ENCODINGS = {
    "deepseek_v4": V4,
    "deepseek_v4_first": ChatTemplate(DeepSeekV4Encoding(EFFORTS_FIRST)),
    "deepseek_v32": V32,
}
USER = {"role": "user", "content": "u"}
EOS = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_prompts_are_the_references(case):
    unfinished = case.get("unfinished", False)
    text = ENCODINGS[case["encoding"]].render(
        case["messages"],
        tools=case["tools"],
        response_format=case.get("response_format"),
        add_generation_prompt=not unfinished,
        **case["switches"],
    )
    assert (text.removesuffix(EOS) if unfinished else text) == case["prompt"]


@pytest.mark.parametrize(
    "files, want",
    [
        ({"encoding/encoding_dsv4.py": "'Reasoning Effort: Beyond maximum'"}, (True, True)),
        ({"encoding/encoding_dsv4.py": "'Reasoning Effort: Absolute maximum'"}, (True, False)),
        ({"config.json": '{"model_type": "deepseek_v4"}'}, (True, True)),
        ({"encoding/encoding_dsv32.py": "raise SystemExit"}, (False, False)),
        ({"config.json": '{"model_type": "deepseek_v32"}'}, (False, False)),
        ({"config.json": '{"model_type": "qwen3_moe"}'}, None),
        ({"config.json": '{"model_type": "deepseek_v3"}'}, None),
    ],
)
def test_which_directories_have_one(tmp_path, files, want):
    (tmp_path / "encoding").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    template = ChatTemplate.from_dir(tmp_path)
    if want is None:
        assert template is None
        return
    text = template.render([USER], reasoning_effort="max")
    v4 = template.render([USER]).endswith("<think>")
    assert (v4, "Beyond maximum" in text) == want
    assert template.guarded() is template
    template.start()
    template.close()
    (tmp_path / "chat_template.jinja").write_text("its own", encoding="utf-8")
    assert ChatTemplate.from_dir(tmp_path).render([USER]) == "its own"


@pytest.mark.parametrize(
    "switches, want",
    [
        ({}, True),
        ({"enable_thinking": False}, False),
        ({"thinking": True, "enable_thinking": False}, False),
        ({"thinking": None}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "none", "thinking": True}, True),
    ],
)
def test_what_turns_thinking_off(switches, want):
    assert V4.render([USER], **switches).endswith("<think>" if want else "</think>")


def test_thoughts_of_the_history_can_be_kept():
    said = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    messages = [USER, said, USER]
    assert "why" not in V4.render(messages)
    assert "<think>why</think>a" in V4.render(messages, drop_thinking=False)


@pytest.mark.parametrize(
    "template, messages, switches, words",
    [
        (V4, [{"role": "critic", "content": "u"}], {}, "critic"),
        (V32, [{"role": "latest_reminder", "content": "u"}], {}, "latest_reminder"),
        (V4, [{**USER, "task": "poem"}], {}, "read_url"),
        (V4, [USER], {"reasoning_effort": "huge"}, "xhigh"),
        (V4, [USER], {"enable_thinking": "yes"}, "true or false"),
        (V32, [USER, {"role": "tool", "content": "r"}], {}, "0 calls"),
    ],
)
def test_what_cannot_be_said(template, messages, switches, words):
    with pytest.raises(RequestError, match=words):
        template.render(messages, **switches)


@pytest.mark.parametrize("template", [V4, V32])
def test_a_prompt_without_the_answers_opening(template):
    text = template.render([USER], add_generation_prompt=False)
    assert text.endswith("<｜User｜>u")


@pytest.mark.parity_live
def test_random_conversations_are_the_librarys():
    recipe = pytest.importorskip("deepseek_recipe", reason="needs the extra parity")
    options, reference = recipe.ConversionOptions(), recipe.DeepseekV4Encoding()
    tools = next(c["tools"] for c in CASES if c["tools"])
    for seed in range(2000):
        rng = random.Random(seed)
        messages, thinking = conversation(rng), rng.random() < 0.7
        offered = tools if rng.random() < 0.5 else None
        effort = rng.choice(["low", "medium", "high", "xhigh", "max"])
        body = {
            "model": "DeepSeek-V4-Pro",
            "messages": messages,
            "reasoning_effort": effort,
            "thinking": {"type": "enabled" if thinking else "disabled"},
            **({"tools": offered} if offered else {}),
        }
        asked = recipe.ChatCompletionRequest(body).convert(options).conversation
        want = reference.render_conversation(asked).prompt
        got = V4.render(messages, tools=offered, thinking=thinking, reasoning_effort=effort)
        assert got == want, seed


def conversation(rng):
    texts = ["hi", "", "zwei\nZeilen ", "<b>é</b>", "  x\n\n"]
    arguments = ["{}", '{"k": 1.5, "s": "é", "n": null, "o": {"a": [1, 2]}}', "no json", "[1]"]
    out = [{"role": "system", "content": "s"}] if rng.random() < 0.5 else []

    def say(role, **more):
        thoughts = {"reasoning_content": rng.choice(texts)} if role == "assistant" else {}
        out.append({"role": role, "content": rng.choice(texts), **thoughts, **more})

    for _ in range(rng.randint(1, 4)):
        say(rng.choice(["user", "user", "latest_reminder"]))
        say("user")
        if rng.random() < 0.2:
            say("system")
        for _ in range(rng.choice([0, 0, 1, 2])):
            # The library sorts calls by id; these are sorted.
            ids = [f"{len(out):03}-{i}" for i in range(rng.randint(1, 3))]
            calls = []
            for i in ids:
                function = {"name": rng.choice("fg"), "arguments": rng.choice(arguments)}
                calls.append({"id": i, "type": "function", "function": function})
            say("assistant", tool_calls=calls)
            for i in rng.sample(ids, len(ids)):
                say("tool", tool_call_id=i)
        say("assistant")
    if rng.random() < 0.8:
        say("user")
    return out
