"""The chat page in a real browser, against a server whose answers are scripted."""

from __future__ import annotations

import json
import threading

import pytest
from support.browser import Chat, needs_chromium
from support.fake_openai import DONE, MODEL, Refusal, chunk, finish, usage

pytestmark = needs_chromium


def test_a_conversation_streams_and_is_sent_back_whole(chat, server):
    gate = threading.Event()

    def script(path, body):
        yield chunk(role="assistant", content="")
        yield chunk("Hello, ")
        gate.wait(20)
        yield b": ping\n\n"
        yield 0.1
        yield chunk("**world**.")
        yield finish()
        yield usage(7, 12)
        yield DONE

    server.script = script
    chat.say("First <b>question</b>")
    chat.until(lambda: "Hello," in chat.text(".turn.assistant .md:nth-of-type(2)"))
    assert chat.one("#stop").is_displayed() and not chat.one("#send").is_displayed()
    gate.set()
    chat.until(lambda: chat.one("#send").is_displayed())
    answer = chat.one(".turn.assistant")
    assert answer.find_element("css selector", "strong").text == "world"
    assert chat.text(".turn.user .said") == "First <b>question</b>"
    stats = answer.find_element("css selector", ".stats").text
    assert stats.startswith("12 tokens · ") and "tokens/s" in stats and "first after" in stats
    chat.ask("Second")
    bodies = [body for path, body in server.requests if path == "/v1/chat/completions"]
    assert bodies[0]["stream"] is True and bodies[0]["model"] == MODEL
    assert bodies[0]["stream_options"] == {"include_usage": True}
    assert "temperature" not in bodies[0]
    assert bodies[1]["messages"] == [
        {"role": "user", "content": "First <b>question</b>"},
        {"role": "assistant", "content": "Hello, **world**."},
        {"role": "user", "content": "Second"},
    ]
    assert chat.errors() == []


def test_stop_ends_the_request_and_keeps_what_came(chat, server):
    def script(path, body):
        yield chunk("partial")
        for _ in range(400):
            yield 0.05
        yield chunk("never")

    server.script = script
    chat.say("go")
    chat.until(lambda: "partial" in chat.text(".turn.assistant"))
    chat.one("#stop").click()
    chat.until(lambda: chat.one("#send").is_displayed())
    assert "Stopped." in chat.text(".turn.assistant")
    chat.until(lambda: server.gone == 1)
    from selenium.webdriver.common.keys import Keys

    chat.say("again")
    chat.until(lambda: len(chat.all(".turn.assistant")) == 2)
    chat.until(lambda: "partial" in chat.all(".turn.assistant")[1].text)
    chat.one("#input").send_keys(Keys.ESCAPE)
    chat.until(lambda: server.gone == 2 and chat.one("#send").is_displayed())
    assert server.requests[1][1]["messages"][1] == {"role": "assistant", "content": "partial"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_folded_away_when_the_answer_begins(chat, server, name):
    gate = threading.Event()

    def script(path, body):
        yield chunk(**{name: "Let me *see*"})
        gate.wait(20)
        yield chunk(**{name: ", yes."})
        yield chunk("The answer.")
        yield finish()
        yield DONE

    server.script = script
    chat.say("think")
    chat.until(lambda: "Let me see" in chat.text(".thinking"))
    assert chat.text(".thinking summary").startswith("Thinking")
    gate.set()
    chat.until(lambda: chat.one("#send").is_displayed())
    fold = chat.one(".thinking")
    assert fold.get_attribute("open") is None and fold.text.startswith("Thought for")
    chat.one(".thinking summary").click()
    assert "Let me see, yes." in fold.text
    server.script = lambda path, body: [chunk("ok"), finish(), DONE]
    chat.ask("next")
    assert server.requests[1][1]["messages"][1]["content"] == "The answer."


ATTACKS = (
    "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>",
    "[a](javascript:window.pwned=1) [b](JaVaScRiPt:window.pwned=1) [c](data:text/html,x)",
    "[d](\x01javascript:window.pwned=1) <javascript:window.pwned=1>",
    "![e](javascript:window.pwned=1)",
    '```"><script>window.pwned=1</script>\n</code></pre><script>window.pwned=1</script>\n```',
    "| <b>x</b> | <svg onload=window.pwned=1> |\n|---|---|\n| <i>y</i> | `<u>z</u>` |",
    "# <iframe srcdoc='<script>parent.pwned=1</script>'>",
    "> <a href='javascript:1'>q</a>\n- <b>l</b>",
)


def test_no_text_of_a_model_becomes_markup(chat, server):
    text = "\n\n".join(ATTACKS)
    server.script = lambda path, body: [chunk(c) for c in text] + [finish(), DONE]
    answer = chat.ask("attack")
    assert chat.js("return window.pwned") is None
    for tag in ("script", "img", "svg", "iframe", "b", "i", "u", "a"):
        assert answer.find_elements("css selector", f".md {tag}") == [], tag
    shown = answer.text
    for part in (
        "<script>window.pwned=1</script>",
        "onerror",
        "<svg onload",
        "<iframe",
        "<u>z</u>",
    ):
        assert part in shown
    assert chat.errors() == []


def test_settings_are_sent_and_kept(chat, server):
    given = {"temperature": "0.5", "top_k": "7", "max_tokens": "9", "seed": "3"}
    given |= {"system": "Be brief.", "stop": "END\nFIN", "thinking": "off"}
    chat.one("#open").click()
    for name, value in given.items():
        chat.one(f"dialog [name={name}]").send_keys(value)
    chat.one("dialog .solid").click()
    chat.until(lambda: not chat.one("dialog").is_displayed())
    chat.ask("hi")
    body = server.requests[-1][1]
    assert body["temperature"] == 0.5 and body["top_k"] == 7 and body["max_tokens"] == 9
    assert body["seed"] == 3 and body["stop"] == ["END", "FIN"] and "top_p" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    again = Chat(chat.driver, server.url)
    assert again.js("return form.elements.namedItem('system').value") == "Be brief."
    again.one("#open").click()
    again.one("#reset").click()
    again.one("dialog .solid").click()
    again.ask("hi")
    assert set(server.requests[-1][1]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (lambda p, b: Refusal(400, "max_tokens: got -1"), "max_tokens: got -1"),
        (lambda p, b: Refusal(429, "queue full", {"retry-after": "3"}), "full (try again in 3 s)"),
        (lambda p, b: [chunk("some"), {"error": {"message": "engine died"}}, DONE], "engine died"),
        (lambda p, b: [chunk("some")], "The connection ended before the answer did."),
        (lambda p, b: [chunk("some"), finish("length"), DONE], "reached its longest length"),
    ],
)
def test_what_went_wrong_is_said_and_can_be_tried_again(chat, server, script, words):
    server.script = script
    answer = chat.ask("hi")
    assert words in answer.find_element("css selector", ".notice").text
    server.script = lambda path, body: [chunk("fine now"), finish(), DONE]
    next(b for b in answer.find_elements("css selector", "button") if b.text == "Try again").click()
    chat.until(lambda: chat.all(".turn.assistant")[-1].text.startswith("fine now"))
    assert len(chat.all(".turn")) == 2
    assert server.requests[-1][1]["messages"] == [{"role": "user", "content": "hi"}]


def test_loading_is_shown_until_the_server_is_ready(chat, server):
    server.ready = (503, {"state": "loading", "stage": "weights", "percent": 42.4})
    chat.js("connect()")
    chat.until(lambda: chat.text("#banner") == "loading: weights, 42 %")
    assert chat.js("return document.querySelector('#banner progress').value") == 42.4
    server.ready = (200, {"state": "ready"})
    chat.until(lambda: not chat.one("#banner").is_displayed())


def test_a_server_with_a_key_asks_for_it(chat, server):
    server.key = "s3cret"
    chat.js("connect()")
    chat.until(lambda: "API key" in chat.text("#banner"))
    chat.one("#open").click()
    chat.one("dialog [name=key]").send_keys("s3cret")
    chat.one("dialog .solid").click()
    chat.until(lambda: not chat.one("#banner").is_displayed())
    assert chat.ask("hi").text.startswith("ok")
    assert "s3cret" not in chat.js("return JSON.stringify(localStorage)")


def test_edit_new_chat_and_keys(chat, server):
    from selenium.webdriver.common.keys import Keys

    chat.ask("first")
    next(b for b in chat.all(".turn.user button") if b.text == "Edit").click()
    assert chat.all(".turn") == [] and chat.js("return $('input').value") == "first"
    chat.one("#input").send_keys(" second", Keys.SHIFT, "\n", Keys.NULL, "line")
    chat.ask("")
    assert server.requests[-1][1]["messages"] == [{"role": "user", "content": "first second\nline"}]
    chat.one("#new").click()
    assert chat.all(".turn") == [] and chat.one("#empty").is_displayed()
    chat.js("document.activeElement.blur()")
    chat.one("body").send_keys("/")
    assert chat.js("return document.activeElement.id") == "input"
    was = chat.js("return getComputedStyle(document.body).backgroundColor")
    chat.one("#theme").click()
    assert chat.js("return getComputedStyle(document.body).backgroundColor") != was


LONG = "\n\n".join(
    [
        "## Why the sky is blue",
        "Sunlight is a mixture of colours. Air molecules scatter **short** waves more than long "
        "ones, by the *fourth power* of the frequency:",
        "| colour | wavelength | scattered |\n|---|--:|--:|\n| blue | 450 nm | 4.4 |\n"
        "| red | 650 nm | 1 |",
        "```python\ndef scattered(wavelength_nm: float) -> float:\n"
        '    """Relative to 650 nm, by Rayleigh\'s law, on one line, too long for a phone."""\n'
        "    return (650 / wavelength_nm) ** 4\n```",
        "1. Look away from the sun.\n2. What reaches you is scattered light.\n   - mostly blue\n"
        "   - some violet, which eyes see less",
        "> At sunset the path is long, and what is left is red.",
        "https://example.org/" + "a" * 120,
    ]
)


@pytest.mark.parametrize(("width", "height", "theme"), [(1200, 850, "light"), (390, 844, "dark")])
def test_it_fits_desktop_and_phone(chat, server, width, height, theme, tmp_path):
    chat.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    chat.js("setTheme(arguments[0])", theme)
    events = [
        chunk(reasoning_content="Rayleigh scattering."),
        chunk(LONG),
        finish(),
        usage(9, 310),
        DONE,
    ]
    server.script = lambda path, body: events
    chat.one("#input").send_keys("Why is the sky blue?")
    chat.one("#send").click()
    chat.until(lambda: chat.all(".turn.assistant") and chat.one("#send").is_displayed())
    chat.driver.save_screenshot(str(tmp_path / f"{theme}.png"))
    outside = chat.js(
        "return [...document.querySelectorAll('body *')].filter((e) => !e.closest('pre, .skip') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    assert chat.js("return document.documentElement.scrollWidth <= innerWidth")
    box = chat.one("#composer").rect
    assert 0 <= box["x"] and box["y"] + box["height"] <= height
    if width < 600:
        for button in chat.all("header button, #send"):
            assert min(button.size.values()) >= 36, button.get_attribute("id")
    chat.one("#open").click()
    chat.driver.save_screenshot(str(tmp_path / f"{theme}_settings.png"))
    assert chat.one("dialog").rect["width"] <= width
    chat.one("dialog .solid").click()


def test_every_request_goes_to_the_server_itself(chat, server):
    server.script = lambda path, body: [chunk("![x](https://e.example/a.png) ok"), finish(), DONE]
    chat.ask("hi")
    names = chat.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert names and all(n.startswith(server.url) for n in names), json.dumps(names)
