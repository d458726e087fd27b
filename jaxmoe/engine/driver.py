"""Drives an engine in a thread of its own: commands in from any thread, events out after each step.

A request may come or be aborted at any time; it takes effect between two steps, so a cancelled
request costs at most the step under way (a long prompt is many steps). What it does not do: know
who listens (thread_engine.py, engine_process.py), or bounds of the queue (admission.py).
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from jaxmoe.common.errors import JaxMoeError
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.messages import AbortRequest, AddRequest, Command, Event, Failed, Stop

STATS_S = 0.1  # making them takes about as long as a hundredth of a small model's step


class Driver:
    """`emit` is called in the driving thread with what a step and the commands before it gave.

    on_step: called after every step, and before `emit`. on_stats: given the engine's figures then,
    whenever it falls idle and every STATS_S while it works.
    """

    def __init__(
        self,
        engine: Engine,
        emit: Callable[[list[Event]], None],
        on_step: Callable[[], None] = lambda: None,
        on_stats: Callable[[dict[str, float]], None] = lambda stats: None,
    ) -> None:
        self._engine = engine
        self._emit = emit
        self._on_step = on_step
        self._on_stats = on_stats
        self._commands: collections.deque[Command] = collections.deque()
        self._changed = threading.Condition()

    def post(self, command: Command) -> None:
        """Hands a command over; from any thread."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def run(self) -> None:
        """Steps until `Stop`. What a failing step raises comes out; the engine is dead then."""
        engine = self._engine
        stats_due_s = 0.0
        while True:
            events: list[Event] = []
            for command in self._take():
                if isinstance(command, Stop):
                    if events:
                        self._emit(events)
                    return
                events += self._apply(command)
            if engine.has_work:
                deltas = engine.step()
                events += engine.take_progress()
                events += deltas
            self._on_step()
            if not engine.has_work or time.monotonic() >= stats_due_s:
                self._on_stats(engine.stats())
                stats_due_s = time.monotonic() + STATS_S
            if events:
                self._emit(events)

    def _take(self) -> list[Command]:
        """All commands there are; waits for one where there is nothing else to do."""
        with self._changed:
            while not self._commands and not self._engine.has_work:
                self._changed.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _apply(self, command: AddRequest | AbortRequest) -> list[Event]:
        if isinstance(command, AbortRequest):
            return list(self._engine.abort(command.request_id))
        try:
            self._engine.add_request(
                command.prompt_token_ids,
                command.params,
                request_id=command.request_id,
                cache_salt=command.cache_salt,
            )
        except JaxMoeError as error:
            return [Failed.of(command.request_id, error)]
        return []
