"""Drives an engine in a thread of its own: commands in from any thread, events out after each step.

A request may come or be aborted at any time; it takes effect between two steps, so a cancelled
request costs at most the step under way (a long prompt is many steps). Steps much shorter than a
display's frame share a message: each costs its reader about as much as such a step. Grammars are
compiled in
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
from jaxmoe.engine.deltas import coalesce
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.messages import AbortRequest, AddRequest, Command, Event, Failed, Stop
from jaxmoe.request import Delta
from jaxmoe.scheduler.scheduler import StepPlan

PREPARERS = 2  # threads for grammars: one hard one does not hold up the next
# How long tokens may wait for those of the next step. A frame of a display is 16 ms. Steps of
# models worth serving are longer, and go out one by one; the demo model's take 1 to 3 ms.
HOLD_S = 0.015
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
        hold_s: float = HOLD_S,
    ) -> None:
        self._engine = engine
        self._hold_s = hold_s
        self._held: list[Event] = []
        self._emitted_s = 0.0
        self._emit = emit
        self._on_step = on_step
        self._on_stats = on_stats
        self._commands: collections.deque[Command | Failed] = collections.deque()
        # Requests whose grammar is being compiled or waits for it; those of an id in their order.
        self._preparing: dict[str, list[AddRequest]] = {}
        self._preparers = concurrent.futures.ThreadPoolExecutor(PREPARERS, "grammars")
        self._changed = threading.Condition()
        self._ended = False
        self._has_news = False  # figures changed without a step

    def post(self, command: Command) -> None:
        """Hands a command over; from any thread. Dropped once `run` has ended."""
        self._engine.wake()
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
            if self._engine.warm_up is not None:
                self._engine.warm_up.stop()
            self._preparers.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        engine = self._engine
        engine.on_plan = self._before_step
        if engine.warm_up is not None:
            engine.warm_up.start(self._note_news)
        stats_due_s = 0.0
        while True:
            for command in self._take():
                if isinstance(command, Stop):
                    self._flush()
                    return
                self._held += self._apply(command)
            progress = []
            if engine.has_work:
                deltas = engine.step()
                progress = engine.take_progress()
                self._held += progress
                self._held += deltas
            self._on_step()
            now_s = time.monotonic()
            if not engine.has_work or now_s >= stats_due_s:
                self._on_stats(engine.stats())
                stats_due_s = now_s + STATS_S
            # First tokens come with progress, and whoever got its last token may ask again.
            if progress or now_s - self._emitted_s >= self._hold_s or not engine.has_work:
                self._flush()
            elif any(not isinstance(e, Delta) or e.finish_reason for e in self._held):
                self._flush()

    def _note_news(self) -> None:
        """An idle engine tells its figures again."""
        with self._changed:
            self._has_news = True
            self._changed.notify()

    def _before_step(self, plan: StepPlan) -> None:
        """A chunk of a prompt may take long."""
        if plan.kind == "prefill":
            self._flush()

    def _flush(self) -> None:
        if self._held:
            events, self._held = coalesce(self._held), []
            self._emit(events)
            self._emitted_s = time.monotonic()

    def _take(self) -> list[Command | Failed]:
        """All commands there are; waits for one where there is nothing else to do."""
        with self._changed:
            while not self._commands and not self._engine.has_work and not self._has_news:
                self._changed.wait()
            self._has_news = False
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
