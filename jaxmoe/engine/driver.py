"""Drives an engine in a thread of its own: commands in from any thread, events out after each step.

A request may come or be aborted at any time; it takes effect between two steps, so a cancelled
request costs at most the step under way (a long prompt is many steps). Grammars are compiled in
threads of their own meanwhile, so that a hard one holds up nobody else. What it does not do: know
who listens (thread_engine.py, engine_process.py), or bounds of the queue (admission.py).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable

from jaxmoe.common.errors import JaxMoeError, RequestError
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.messages import AbortRequest, AddRequest, Command, Event, Failed, Stop

PREPARERS = 2  # threads for grammars: one hard one does not hold up the next
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
        self._commands: collections.deque[Command | Failed] = collections.deque()
        # Requests whose grammar is being compiled or waits for it; those of an id in their order.
        self._preparing: dict[str, list[AddRequest]] = {}
        self._preparers = concurrent.futures.ThreadPoolExecutor(PREPARERS, "grammars")
        self._changed = threading.Condition()
        self._ended = False

    def post(self, command: Command) -> None:
        """Hands a command over; from any thread. Dropped once `run` has ended."""
        with self._changed:
            if self._ended:
                return
            if isinstance(command, AddRequest) and command.params.structured is not None:
                # A second request of that id meets the first one when both are added.
                self._preparing.setdefault(command.request_id, []).append(command)
                self._preparers.submit(self._prepare, command)
                return
            if isinstance(command, AbortRequest):
                # They end at once, as requests of no grammar: no step comes between the two.
                for waiting in self._preparing.pop(command.request_id, []):
                    params = dataclasses.replace(waiting.params, structured=None)
                    self._commands.append(dataclasses.replace(waiting, params=params))
                    self._commands.append(command)
            self._commands.append(command)
            self._changed.notify()

    def _is_wanted(self, command: AddRequest) -> bool:
        """Whether nobody has aborted it. Under the lock."""
        return any(c is command for c in self._preparing.get(command.request_id, ()))

    def _prepare(self, command: AddRequest) -> None:
        with self._changed:
            if not self._is_wanted(command):
                return
        result: AddRequest | Failed = command
        try:
            self._engine.prepare(command.params)
        except Exception as error:  # whatever it is, it ends this request and nothing else
            known = error if isinstance(error, JaxMoeError) else RequestError(f"grammar: {error}")
            result = Failed.of(command.request_id, known)
        with self._changed:
            if not self._is_wanted(command):  # answered meanwhile
                return
            left = [c for c in self._preparing.pop(command.request_id) if c is not command]
            if left:
                self._preparing[command.request_id] = left
            self._commands.append(result)
            self._changed.notify()

    def run(self) -> None:
        """Steps until `Stop`. What a failing step raises comes out; the engine is dead then."""
        try:
            self._run()
        finally:
            with self._changed:
                self._ended = True
            self._preparers.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
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

    def _take(self) -> list[Command | Failed]:
        """All commands there are; waits for one where there is nothing else to do."""
        with self._changed:
            while not self._commands and not self._engine.has_work:
                self._changed.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _apply(self, command: AddRequest | AbortRequest | Failed) -> list[Event]:
        if isinstance(command, Failed):
            return [command]
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
