"""Every case is fed in every possible cut: what comes out does not depend on it."""

import pytest
from support import pieces

from jaxmoe.common.errors import ConfigError
from jaxmoe.text.reasoning import (
    REASONING_FORMATS,
    ReasoningParser,
    choose_reasoning_format,
    opens_thoughts,
    reasoning_format,
)

DEEPSEEK_CALLS = "<｜tool▁calls▁begin｜>"
KIMI_CALLS = "<|tool_calls_section_begin|>"


def parse(name, parts, thinking):
    parser = ReasoningParser(REASONING_FORMATS[name], thinking=thinking)
    thoughts, answer, given = "", "", []
    for part in parts:
        t, a = parser.feed(part)
        assert not (answer and t), "a thought after the answer began"
        thoughts, answer = thoughts + t, answer + a
        given.append((t, a))
    t, a = parser.finish()
    return thoughts + t, answer + a, given


CASES = [
    # format, begins inside the thoughts, text, thoughts, answer
    ("deepseek_r1", True, "I add.\n</think>\n\n4", "I add.", "4"),
    ("deepseek_r1", True, "<think>\nI add.\n</think>\n\n4", "I add.", "4"),
    ("deepseek_r1", False, "4 < 5 <thinking", "", "4 < 5 <thinking"),
    ("deepseek_r1", True, "cut off", "cut off", ""),
    ("deepseek_r1", True, "cut off </thi", "cut off </thi", ""),
    ("deepseek_r1", True, f"need it\n{DEEPSEEK_CALLS}x", "need it", f"{DEEPSEEK_CALLS}x"),
    ("deepseek_r1", True, "a\n\nb\n \n</think> c\n", "a\n\nb\n ", " c\n"),
    ("qwen3", False, "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
    ("qwen3", False, "<think>\n\n</think>\n\nyes", "", "yes"),
    ("qwen3", False, "\n<think>hm</think>yes", "hm", "yes"),
    ("qwen3", False, "\n yes <think>no</think>", "", "\n yes <think>no</think>"),
    ("qwen3", True, "\nhm</think>\n", "hm", ""),
    ("qwen3", True, "a <b> </b> <think> c</think>d</think>", "a <b> </b> <think> c", "d</think>"),
    ("qwen3", False, "<thin", "", "<thin"),
    ("qwen3", False, "<think>", "", ""),
    ("qwen3", False, "", "", ""),
    ("qwen3", True, "", "", ""),
    ("deepseek_v4", True, "a</think>\n\nb", "a", "b"),
    ("deepseek_v4", True, "a\n\n<｜DSML｜tool_calls>\n", "a", "<｜DSML｜tool_calls>\n"),
    ("deepseek_v4", True, "a<｜DSML｜function_calls>", "a", "<｜DSML｜function_calls>"),
    ("kimi_k2", False, f"<think>a{KIMI_CALLS}", "a", KIMI_CALLS),
    ("kimi_k2", False, f"<think>a</think>{KIMI_CALLS}", "a", KIMI_CALLS),
    ("kimi_k2", True, "naïve 🙂</think>👩‍👩‍👧", "naïve 🙂", "👩‍👩‍👧"),
]


@pytest.mark.parametrize("name,thinking,text,thoughts,answer", CASES)
def test_thoughts_and_answer_in_every_cut(name, thinking, text, thoughts, answer):
    for parts in pieces.splits(text):
        got_thoughts, got_answer, _ = parse(name, parts, thinking)
        assert (got_thoughts, got_answer) == (thoughts, answer), parts


def test_text_is_given_as_soon_as_it_is_certain():
    _, _, given = parse("qwen3", ["<think>", "\nwe", " add", " </", "b", "\n</think>", "4"], False)
    assert given == [
        ("", ""), ("we", ""), (" add", ""), (" ", ""), ("</b", ""), ("", ""), ("", "4"),
    ]  # fmt: skip


def test_whether_it_is_thinking_is_known():
    parser = ReasoningParser(REASONING_FORMATS["qwen3"])
    states = [parser.thinking]
    for part in ("<think>", "a", "</think>", "b"):
        parser.feed(part)
        states.append(parser.thinking)
    assert states == [False, False, True, False, False]
    assert ReasoningParser(REASONING_FORMATS["qwen3"], thinking=True).thinking


@pytest.mark.parametrize(
    "prompt,continued,want",
    [
        ("<｜User｜>hi<｜Assistant｜><think>\n", "", True),
        ("<｜User｜>hi<｜Assistant｜><think>", "", True),
        ("<｜User｜>hi<｜Assistant｜></think>", "", False),
        ("<|im_start|>assistant\n", "", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", False),
        ("<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", "", False),
        ("<|im_start|>assistant\n<think>\nWell,", "<think>\nWell,", True),
        ("<|im_start|>assistant\n<think>\nWell,", "Well,", True),
        ("<|im_start|>assistant\n<think>a</think>So", "<think>a</think>So", False),
        ("<|im_start|>assistant\nSo", "So", False),
    ],
)
def test_the_prompt_says_where_the_text_begins(prompt, continued, want):
    assert opens_thoughts(prompt, REASONING_FORMATS["qwen3"], continued) is want


@pytest.mark.parametrize(
    "template,want",
    [
        (None, None),
        ("{{ messages }}", None),
        ("<｜Assistant｜>{{ content.split('</think>') }}<｜tool▁calls▁begin｜>", "deepseek_r1"),
        ("<think></think><｜Assistant｜><｜DSML｜tool_calls>", "deepseek_v4"),
        ("<|im_start|>assistant\n<think>\n\n</think>", "qwen3"),
        ("<|im_middle|><think>{{ r }}</think>", "kimi_k2"),
    ],
)
def test_the_template_chooses_the_format(template, want):
    assert choose_reasoning_format(template) == want


def test_an_unknown_format_is_named():
    with pytest.raises(
        ConfigError, match="got 'o1', wanted one of deepseek_r1, deepseek_v4, qwen3"
    ):
        reasoning_format("o1")
