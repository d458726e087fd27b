"""Headless Chromium with its driver, for tests of the chat page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_openai import MODEL

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="chromium and chromedriver are not installed (Debian: chromium chromium-driver)",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    # Names but this machine's lead nowhere, so that a page that fetches something fails its test.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator:
    """A WebDriver with a fresh profile in `profile`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "accept")
    service = webdriver.ChromeService(executable_path=str(DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Chat:
    """The page as a person sees it. model: the one the server names."""

    def __init__(self, driver, url, model=MODEL):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.set_window_size(1200, 850)
        driver.get(url + "/")
        self.until(lambda: self.text("#model") == model)

    @classmethod
    def on(cls, driver):
        """The page as it is, whatever it says of its server."""
        chat = cls.__new__(cls)
        chat.driver = driver
        return chat

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        return self.driver.find_element("css selector", css)

    def text(self, css):
        return self.one(css).text

    def until(self, what, timeout=30):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, timeout, poll_frequency=0.05).until(lambda d: what())

    def say(self, text):
        self.one("#input").send_keys(text + "\n")

    def ask(self, text):
        """Says something and waits for the end of the answer; its element."""
        self.say(text)
        self.until(lambda: self.one("#send").is_displayed())
        return self.all(".turn.assistant")[-1]

    def setting(self, name, value):
        self.js(
            "document.forms[1].elements.namedItem(arguments[0]).value = arguments[1];"
            "saveSettings();",
            name,
            value,
        )

    def errors(self):
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
