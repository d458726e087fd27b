"""The commands on an engine computable by hand: it answers every prompt with its letters
reversed.
"""

from types import SimpleNamespace

import pytest
from support import fake_step

import jaxmoe.llm
from jaxmoe.llm import LLM
from jaxmoe.text.chat_template import ChatTemplate

TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}")


def make_llm(config=None):
    engine, _ = fake_step.make_engine(lambda prompt: prompt[::-1], num_pages=64)
    llm = LLM.on_engine(engine, engine.tokenizer, TEMPLATE)
    llm.report = "the report"
    return llm


@pytest.fixture
def loaded(monkeypatch):
    """Makes the commands load that engine; `loaded.config` is the config it was asked with."""
    seen = SimpleNamespace(config=None)

    def of(cls, config):
        seen.config = config
        return make_llm(config)

    monkeypatch.setattr(jaxmoe.llm.LLM, "of", classmethod(of))
    return seen
