"""The chat page, `index.html` beside this file, as bytes and headers; which route it has is the
server's business.

The Content-Security-Policy names the page's own script and style by their hash and allows nothing
else: even if a model's text came to be parsed as HTML, no script in it would run, and nothing is
ever fetched from another host.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Page:
    """body: UTF-8 HTML. headers: names in lower case; `etag` answers If-None-Match."""

    body: bytes
    headers: Mapping[str, str]

    def is_current(self, if_none_match: str | None) -> bool:
        """Whether a browser that sent this If-None-Match header has the page (status 304)."""
        given = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
        return self.headers["etag"] in given


@functools.cache
def chat_page() -> Page:
    """The page as installed. Raises OSError where it is not part of the installation."""
    body = (resources.files("jaxmoe.serving.web") / "index.html").read_bytes()
    text = body.decode()
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(text, "script"),
        "style-src": _hashes(text, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-cache",  # ask each time; the answer is 304 while nothing changed
        "cross-origin-opener-policy": "same-origin",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    return Page(body, headers)


def _hashes(text: str, tag: str) -> str:
    """The CSP sources of the page's inline `tag` elements."""
    parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()) for part in parts)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
