"""Templates in processes of their own: the same text as without, and limits that hold."""

import gc
import threading
import time
from pathlib import Path

import psutil
import pytest

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.text import template_process
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.template_process import TemplateProcess

DEMO = Path(template_process.__file__).parents[1] / "demo"
ASK = [{"role": "user", "content": "h\u00e9 \U0001f680 {{ 7 }}"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HARD = "{% if messages[0]['content'] == 'hard' %}" + LOOPS + "{% endif %}ok"


@pytest.fixture
def process():
    made = []

    def make(source, timeout_s=10.0):
        made.append(TemplateProcess(source, timeout_s))
        return made[-1]

    yield make
    for p in made:
        p.close()


def variables(content="easy"):
    return {"messages": [{"role": "user", "content": content}]}


def test_the_text_is_the_same():
    plain = ChatTemplate.from_dir(DEMO)
    guarded = plain.guarded()
    try:
        guarded.start()
        for more in ({}, {"add_generation_prompt": False}, {"enable_thinking": True}):
            assert guarded.render(ASK, **more) == plain.render(ASK, **more)
        with pytest.raises(RequestError) as info:
            guarded.render([{"role": "nobody", "content": 1}])
        with pytest.raises(RequestError) as same:
            plain.render([{"role": "nobody", "content": 1}])
        assert str(info.value) == str(same.value)
    finally:
        guarded.close()


def test_what_the_template_refuses_is_said(process):
    with pytest.raises(RequestError, match="refused the messages: roles must alternate"):
        process("{{ raise_exception('roles must alternate') }}").render(variables())
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% if %}").guarded()


def test_loops_without_end_end(process):
    p = process(HARD, 0.5)
    p.start()
    start = time.monotonic()
    with pytest.raises(RequestError, match=r"took more than 0.5 s for these messages; send less"):
        p.render(variables("hard"))
    assert time.monotonic() - start < 5
    assert p.render(variables()) == "ok"  # by a new one


def test_a_hard_conversation_does_not_hold_up_the_next(process):
    p = process(HARD, 20.0)
    p.start()
    thread = threading.Thread(
        target=lambda: pytest.raises(RequestError, p.render, variables("hard"))
    )
    thread.start()
    time.sleep(0.1)
    start = time.monotonic()
    assert p.render(variables()) == "ok"
    assert time.monotonic() - start < 10 and thread.is_alive()
    p.close()  # ends the hard one too
    thread.join(10)  # the limits are 20 s
    assert not thread.is_alive()


def test_memory_has_a_limit(process):
    """Sixteen megabytes at a time are allowed; all of them together are not."""
    source = (
        "{% set n = namespace(l=[]) %}{% for i in range(200) %}"
        "{% set n.l = n.l + ['x' * 16000000 + (i | string)] %}{% endfor %}ok"
    )
    p = process(source)
    p.start()
    before = psutil.Process().memory_info().rss
    with pytest.raises(RequestError, match="memory|nested too deeply"):
        p.render(variables())
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_they_end_with_their_owner():
    p = TemplateProcess("x")
    p.start()
    pids = p.pids
    assert len(pids) == template_process.PROCESSES
    del p
    gc.collect()
    assert not any(map(psutil.pid_exists, pids))
