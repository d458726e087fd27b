"""How much may wait: a bounded queue that says no at once, with what to do. Pure Python."""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import CapacityError


@dataclasses.dataclass(frozen=True)
class QueueBounds:
    """max_requests, max_tokens: requests whose prompt is not being computed yet, and their prompt
    tokens together.
    """

    max_requests: int = 256
    max_tokens: int = 2**20

    def check(self, queued_requests: int, queued_tokens: int, prompt_tokens: int) -> None:
        """Raises CapacityError where one more request of `prompt_tokens` has no place.

        An empty queue takes a prompt of any length: whether it can be served at all is not a
        matter of the queue.
        """
        if queued_requests >= self.max_requests:
            raise CapacityError(
                f"the queue is full: {queued_requests} requests wait, at most {self.max_requests} "
                "may (max_queued_requests); try again later"
            )
        if queued_requests and queued_tokens + prompt_tokens > self.max_tokens:
            raise CapacityError(
                f"the queue is full: {queued_tokens} prompt tokens wait and this request brings "
                f"{prompt_tokens}, at most {self.max_tokens} may wait (max_queued_tokens); try "
                "again later"
            )
