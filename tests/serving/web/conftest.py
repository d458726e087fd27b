"""A browser on the chat page, served by a script."""

from __future__ import annotations

import pytest
from support.browser import Chat, open_browser
from support.fake_openai import DONE, chunk, finish, serving

from jaxmoe.serving.web.page import chat_page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def server():
    with serving(lambda path, body: [chunk(role="assistant"), chunk("ok"), finish(), DONE]) as s:
        page = chat_page()
        s.page = (page.body, dict(page.headers))
        yield s


@pytest.fixture
def chat(browser, server):
    chat = Chat(browser, server.url)
    yield chat
    chat.js("localStorage.clear(); messages = [];")
