"""Joining the deltas of a completion, for readers that are slower than the steps, or that steps
shorter than a display's frame are not worth a message each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.engine.messages import Event
from jaxmoe.request import Delta

MERGED_TOKENS = 64  # of one delta: what is read later comes in pieces that still stream


def merge(last: Delta, new: Delta) -> Delta | None:
    """Two successive deltas of a completion as one, where nothing but tokens and text is added."""
    if (
        last.finish_reason is not None
        or new.prompt_logprobs is not None
        or len(last.token_ids) >= MERGED_TOKENS
    ):
        return None
    logprobs = None
    if last.logprobs is not None and new.logprobs is not None:
        logprobs = last.logprobs + new.logprobs
    return dataclasses.replace(
        new,
        text=last.text + new.text,
        token_ids=last.token_ids + new.token_ids,
        logprobs=logprobs,
        prompt_logprobs=last.prompt_logprobs,
    )


def coalesce(events: Iterable[Event]) -> list[Event]:
    """The events of some steps, each completion's deltas joined and of progress only the latest.
    Those of a request stay in their order, but for completions, which are independent.
    """
    out: list[Event | None] = []
    last: dict[tuple[str, int], int] = {}  # where each completion's latest delta is
    for event in events:
        if not isinstance(event, (Delta, PrefillProgress)):
            out.append(event)
            continue
        key = event.request_id, event.index if isinstance(event, Delta) else -1
        at = last.get(key)
        if at is not None:
            known = out[at]
            joined = event
            if isinstance(event, Delta):
                assert isinstance(known, Delta)
                joined = merge(known, event)
            if joined is not None:
                # At the end: the delta with a request's output comes after all others.
                out[at] = None
                event = joined
        last[key] = len(out)
        out.append(event)
    return [event for event in out if event is not None]
