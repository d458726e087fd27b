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
    events = list(events)
    if len(events) < 2:
        return events
    out: list[list[Delta] | Event | None] = []
    last: dict[tuple[str, int], int] = {}  # where each completion's latest deltas are
    for event in events:
        if isinstance(event, Delta):
            key = event.request_id, event.index
            at = last.get(key)
            known = None if at is None else out[at]
            group = [event]
            # At the end: the delta with a request's output comes after all others.
            if isinstance(known, list) and at is not None and _joins(known, event):
                out[at] = None
                known.append(event)
                group = known
            last[key] = len(out)
            out.append(group)
        elif isinstance(event, PrefillProgress):
            key = event.request_id, -1
            if key in last:
                out[last[key]] = None
            last[key] = len(out)
            out.append(event)
        else:
            out.append(event)
    return [_joined(e) if isinstance(e, list) else e for e in out if e is not None]


def _joins(group: list[Delta], new: Delta) -> bool:
    short = len(group) < MERGED_TOKENS and len(group[0].token_ids) < MERGED_TOKENS
    return short and group[-1].finish_reason is None and new.prompt_logprobs is None


def _joined(group: list[Delta]) -> Delta:
    """As `merge` of one after the other, made once."""
    first, last = group[0], group[-1]
    if first is last:
        return first
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(entry for d in group for entry in d.logprobs or ())
    return dataclasses.replace(
        last,
        text="".join([d.text for d in group]),
        token_ids=tuple([token for d in group for token in d.token_ids]),
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
    )
