import json

import pytest
from support import tiny_tokenizer

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.text import chat_template
from jaxmoe.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def test_the_template_of_a_directory_with_dict_form_tokens(tmp_path):
    tiny_tokenizer.write(tmp_path)
    template = ChatTemplate.from_dir(tmp_path)
    messages = [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "yo"}]
    assert template.render(messages) == "<｜bos｜>S\nU: hi\nA: yo<｜eos｜>\nA:"
    assert template.render(USER, add_generation_prompt=False) == "<｜bos｜>U: hi\n"


def test_where_a_template_is_looked_for(tmp_path):
    assert ChatTemplate.from_dir(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "list"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "list"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "file"


@pytest.mark.parametrize(
    "source,kwargs,want",
    [
        ("{% if enable_thinking %}T{% endif %}", {"enable_thinking": True}, "T"),
        ("{{ {'é': '<'} | tojson }}", {}, '{"é": "<"}'),
        (
            "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            {},
            "01",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", {}, "hi"),
        ("{{ strftime_now('%%') }}", {}, "%"),
        ("{{ '-' * 3 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ '%s' % 'x' }}", {}, "---38x"),
        ("  {% if true %}\nx\n  {% endif %}\n", {}, "x\n"),
        ("{% if tools is none %}n{% endif %}", {}, "n"),
    ],
)
def test_what_templates_use(source, kwargs, want):
    assert ChatTemplate(source).render(USER, **kwargs) == want


@pytest.mark.parametrize(
    "source,words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ messages[0].__init__.__globals__ }}", "unsafe|undefined|no attribute"),
        ("{{ 'a' * 10**9 }}", "too large|too long"),
        ("{{ 'a' * 1000000000 }}", "too long"),
        ("{{ '%1000000000d' % 1 }}", "too large"),
        ("{% for i in range(10**6) %}{% endfor %}", "too large|[Rr]ange"),
        ("{{ messages[0].content + 1 }}", "refused"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ '{} {}'.format(1) }}", "index"),
        ("{{ 'x' | dictsort }}", "items"),
    ],
)
def test_what_templates_may_not(source, words):
    with pytest.raises(RequestError, match=words):
        ChatTemplate(source).render(USER)


def test_output_is_capped(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_CHARS", 1000)
    with pytest.raises(RequestError, match="more than 1000 characters"):
        ChatTemplate("{% for i in range(99) %}{{ 'x' * 50 }}{% endfor %}").render(USER)


def test_a_broken_template_is_the_checkpoints_fault():
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    "messages,words",
    [
        ("hi", "wanted a list of messages"),
        ([], "messages: got 0"),
        ({"role": "user"}, "wanted a list"),
        (["hi"], r"messages\[0\]: got 'hi'"),
        ([{"content": "x"}], r"messages\[0\].role: got None"),
        ([{"role": 1, "content": "x"}], r"messages\[0\].role: got 1"),
        ([{"role": "user"}], r"messages\[0\].content: got None"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: got 3"),
        ([{"role": "user", "content": "\udc00"}], "lone surrogate"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]: got"),
    ],
)
def test_bad_messages(messages, words):
    with pytest.raises(RequestError, match=words):
        ChatTemplate("x").render(messages)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": parts}]) == "ab"


@pytest.mark.parametrize("kwargs", [{"bos_token": "x"}, {"thinking": [1]}])
def test_bad_template_arguments(kwargs):
    with pytest.raises(RequestError, match="chat template argument"):
        ChatTemplate("x").render(USER, **kwargs)
