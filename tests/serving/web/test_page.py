"""What the page allows, as its headers and its source say it."""

from __future__ import annotations

import re

from jaxmoe.serving.web.page import chat_page


def test_the_policy_names_every_inline_script_and_style_and_allows_nothing_else():
    page = chat_page()
    text = page.body.decode()
    policy = dict(p.split(" ", 1) for p in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"<{tag}>") == 1
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", policy[f"{tag}-src"])
    assert " style=" not in text and not re.search(r"\son[a-z]+=", text)


def test_nothing_comes_from_elsewhere_and_nothing_parses_html():
    text = chat_page().body.decode()
    linked = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert linked and all(link.startswith(("data:", "#")) for link in linked)
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
    ):
        assert word not in text


def test_a_browser_that_has_the_page_is_told_so():
    page = chat_page()
    etag = page.headers["etag"]
    assert page.is_current(etag) and page.is_current(f'"other", W/{etag}')
    assert not page.is_current(None) and not page.is_current('"other"')
