"""Who is let in before anything is computed for it: a count of requests and completions.

The engine bounds its own queue; this bounds what the front itself holds (texts being tokenized,
streams being written) and what one API key may take. Pure Python, no clock.
"""

from __future__ import annotations

import collections

from jaxmoe.serving.errors import ApiError


class Admission:
    """max_requests: in work at once, all keys together; max_per_key: of one key. Where no keys are
    asked for, all requests are nobody's, and only the first bound holds.
    """

    def __init__(self, max_requests: int, max_per_key: int) -> None:
        self.max_requests = max_requests
        self.max_per_key = max_per_key
        self._by_key: collections.Counter[str] = collections.Counter()
        self._requests = 0

    @property
    def requests(self) -> int:
        """Requests in work."""
        return self._requests

    def enter(self, key: str | None) -> Ticket:
        """A place for one request of a key, or of nobody; ApiError 429 where there is none."""
        if self._requests >= self.max_requests:
            raise ApiError(
                429,
                f"{self._requests} requests are in work, at most {self.max_requests} may be; try "
                "again later",
                code="queue_full",
                retry_after_s=1.0,
            )
        if key is not None and self._by_key[key] >= self.max_per_key:
            raise ApiError(
                429,
                f"{self._by_key[key]} requests of this API key are in work, at most "
                f"{self.max_per_key} may be (max_requests_per_key); wait for one to end",
                code="key_limit",
                retry_after_s=1.0,
            )
        self._requests += 1
        if key is not None:
            self._by_key[key] += 1
        return Ticket(self, key)

    def _leave(self, key: str | None) -> None:
        self._requests -= 1
        if key is None:
            return
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]


class Ticket:
    """A place taken; leaving it twice does nothing."""

    def __init__(self, admission: Admission, key: str | None) -> None:
        self._admission: Admission | None = admission
        self._key = key

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exc: object) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._leave(self._key)
