"""Which sequences take part in the next step: continuous batching in pure Python, without arrays or
clocks.

A step is either a prefill (parts of prompts, packed up to `prefill_chunk_tokens`) or a decode (one
token of every running sequence), never a mixture: the two use different kernels, and a token must
be computed by the same one whatever else is in the batch. Where both kinds of work wait, they
alternate, so neither starves the other. Prompts that `streams` says are better computed with the
experts streamed to the device (prefill_route.py) take many steps of kind "stream", one layer each;
in between come decodes, and chunks of shorter prompts. Where a worker with a device of its own
computes them (`aside`), one step of that kind begins a pass, and everything else goes on meanwhile.

Admission is in order of arrival plus the seconds that a prompt is expected to take (`predict`): a
prompt is overtaken by shorter ones only, and only by those that come while it would itself have
been computed, so its wait is bounded whatever comes. A sequence enters when a slot is free, the
batch may grow (`limits`) and its known tokens
and one more fit the free pages; pages of its prompt that the prefix cache knows need no room and
no prefill, for models with recurrent state up to the last position whose state was kept. Pages for
output are taken one by one. When none is left, the latest arrival gives all of its pages back and
returns to the head of the queue. Where a `keeper` has room they are kept, and put back when there
are pages again; else its prompt is computed again and its output is fed again
token by token, which repeats the same arithmetic, so preemption never changes a text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

from jaxmoe.common.errors import CapacityError
from jaxmoe.kv_cache.pages import PageAllocator
from jaxmoe.kv_cache.prefix import PrefixCache
from jaxmoe.kv_cache.states import StateCache
from jaxmoe.request import Sequence, Status
from jaxmoe.scheduler.prefill_route import Path, StreamedPass


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence's part of a step: `count` tokens from position `start`.

    A row of a decode may have guesses of its sequence's next tokens after its one known token.

    samples: whether the step's last known token of this row is its last one, so that its draw is
    kept. saves: (position, slot): where the recurrent state before that position is kept.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool
    saves: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """path: of kind "stream", the way that the prompt's pass takes."""

    kind: Literal["prefill", "decode", "stream"]
    rows: tuple[Row, ...]
    path: Path = "chunked"

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


class Limits(Protocol):
    """What a target time per token allows: tpot_target.py."""

    def max_rows(self, most: int) -> int: ...
    def chunk_tokens(self, num_decoding: int) -> int: ...


class Keeper(Protocol):
    """Where pages of sequences that give way are kept: engine/kept_pages.py."""

    def keep(self, seq: Sequence, num_pages: int) -> bool: ...
    def restore(self, seq: Sequence, num_pages: int) -> None: ...
    def forget(self, seq: Sequence) -> None: ...


class Scheduler:
    """Owns the queue, the slots and the pages of the sequences it was given.

    streams: the streamed pass that a prompt with so many tokens left to compute is to take next, or
    None; None: never any. aside: whether they are computed beside the steps, until `advance` says
    that a pass is done. predict: seconds that so many tokens of a prompt are expected to take;
    None: order of arrival. keeper: of preempted sequences' pages; None: they are computed again, as
    are those with recurrent state. limits: of the batch and of chunks beside decodes; None: none.
    prefix: where pages of prompts are shared; None: nowhere. states: where recurrent states are
    kept, which a model that has them needs beside `prefix`; None for others.
    prompt_logprobs_tokens: of a prompt whose log probabilities are wanted, in one step; such a step
    has no other row.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        max_num_seqs: int,
        prefill_chunk_tokens: int,
        prefix: PrefixCache | None = None,
        states: StateCache | None = None,
        prompt_logprobs_tokens: int = 64,
        streams: Callable[[int], StreamedPass | None] | None = None,
        aside: bool = False,
        predict: Callable[[int], float] | None = None,
        limits: Limits | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.pages = pages
        self.prefix = prefix
        self.states = states
        self._prompt_logprobs_tokens = min(prompt_logprobs_tokens, prefill_chunk_tokens)
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._free_slots = list(range(max_num_seqs))  # a heap
        self._streams = streams or (lambda tokens: None)
        self._aside = aside
        self._predict = predict
        self._limits = limits
        self._keeper = keeper
        self._kept: dict[int, int] = {}  # id of a sequence -> its computed tokens that are kept
        self._max_num_seqs = max_num_seqs
        self._streaming: Sequence | None = None
        self._pass: StreamedPass | None = None  # of `_streaming`
        self._last_kind = "decode"
        self._last_prefill = "prefill"
        self.num_guesses = 0  # of each sequence, that the next decode verifies at most

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence. The pool must be able to hold it alone (the engine checks
        requests).
        """
        assert seq.status is Status.WAITING and not seq.pages
        self.waiting.append(seq)

    def cancel(self, seq: Sequence) -> None:
        """Ends a sequence wherever it is; pages and slot are free at once."""
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
            if self._kept.pop(id(seq), 0) and self._keeper is not None:
                self._keeper.forget(seq)
        elif seq.status is not Status.FINISHED:
            self._release(seq)
        seq.status = Status.FINISHED

    def plan(self) -> StepPlan | None:
        """The next step, with all pages it writes to already held; None when there is nothing to
        do.
        """
        if self.states is not None:
            self.states.forget_reserved()
        self._admit()
        begins = self._begin_aside()
        if begins is not None:
            return begins
        prefilling = self._prefilling()
        decoding = any(s.status is Status.DECODE for s in self.running)
        if prefilling and (self._last_kind == "decode" or not decoding):
            self._last_kind = "prefill"
            return self._plan_prefill(prefilling)
        if decoding:
            plan = self._plan_decode()
            if plan.rows:
                self._last_kind = "decode"
                return plan
            # The only one that decodes had to give its pages to prompts that came before it.
            prefilling = self._prefilling()
            if prefilling:
                self._last_kind = "prefill"
                return self._plan_prefill(prefilling)
        assert not self.waiting or self._streaming, "an idle engine must be able to admit"
        return None

    def _prefilling(self) -> list[Sequence]:
        """Those whose prompts the steps have to compute."""
        prefilling = [s for s in self.running if s.status is Status.PREFILL]
        return self._chunked(prefilling) if self._aside else prefilling

    def _begin_aside(self) -> StepPlan | None:
        """The next pass of a prompt that is computed beside the steps, if one is to begin."""
        if not self._aside or self._streaming is not None:
            return None
        self._choose_stream([s for s in self.running if s.status is Status.PREFILL])
        return None if self._streaming is None else self._stream_step(self._streaming)

    def _choose_stream(self, prefilling: list[Sequence]) -> None:
        """The next one whose prompt is to be streamed."""
        streamed = [s for s in prefilling if self._next_pass(s) is not None]
        self._streaming = min(streamed, key=self._turn, default=None)
        # Settled here: what is learned before the pass begins is for the next one.
        self._pass = None if self._streaming is None else self._next_pass(self._streaming)

    def _stream_step(self, seq: Sequence) -> StepPlan:
        assert self._pass is not None
        row = Row(seq, seq.num_computed, self._pass.tokens, samples=False)
        return StepPlan("stream", (row,), self._pass.path)

    def advance(self, plan: StepPlan, right: Iterable[int] = ()) -> None:
        """Notes that the step was computed. Call it before the drawn tokens are appended.

        right: of a decode with guesses, how many of each row's were drawn too.
        """
        counts = [1 + n for n in right] or [row.count for row in plan.rows]
        for row, count in zip(plan.rows, counts, strict=True):
            row.seq.is_new = False
            row.seq.num_computed = row.start + count
            self._release_state(row.seq)
            if plan.kind == "stream":
                self._streaming = None
            if plan.kind != "decode":
                self._publish(row)
            if row.seq.num_computed >= row.seq.num_prompt:
                row.seq.status = Status.DECODE

    @contextlib.contextmanager
    def borrow(self, num_tokens: int) -> Iterator[tuple[list[int], int]]:
        """Pages for `num_tokens` and a slot, for work beside the sequences; CapacityError
        if none.
        """
        if not self._free_slots:
            raise CapacityError("all sequences of max_num_seqs are running; wait for one to finish")
        pages = self.pages.allocate(self.pages.pages_for(num_tokens))
        slot = heapq.heappop(self._free_slots)
        try:
            yield pages, slot
        finally:
            self.pages.free(pages)
            heapq.heappush(self._free_slots, slot)

    def _turn(self, seq: Sequence) -> tuple[bool, float]:
        """Sorts sequences by whose turn it is. Who had to give way comes first."""
        if self._predict is None:
            return (seq.num_preemptions == 0, 0.0)
        return (
            seq.num_preemptions == 0,
            seq.request.arrival_s + self._predict(seq.num_prompt),
        )

    def _admit(self) -> None:
        most = self._max_num_seqs
        if self._limits is not None:
            most = self._limits.max_rows(most)
        passed: set[int] = set()
        while self._free_slots and len(self.running) < most:
            candidates = [s for s in self.waiting if id(s) not in passed]
            if not candidates:
                return
            seq = min(candidates, key=self._turn)
            need = self.pages.pages_for(seq.num_tokens + 1)
            # A prompt that fills the context has no position after its last token.
            need = min(need, self.pages.num_pages)
            if id(seq) in self._kept:
                if need > self.pages.num_free:
                    return
                self._resume(seq, need)
                continue
            found, state = self._find(seq)
            computing = self._on_its_way(seq, len(found))
            if computing is not None:
                self.pages.free(found)
                if computing is not self._streaming and self._next_pass(computing) is None:
                    return
                passed.add(id(seq))
                continue
            if need - len(found) > self.pages.num_free:
                self.pages.free(found)
                return
            self.waiting.remove(seq)
            seq.num_computed = len(found) * self.pages.page_size
            seq.pages = found + self.pages.allocate(need - len(found))
            seq.slot = heapq.heappop(self._free_slots)
            seq.state_from = state
            if self.states is not None and state >= 0:
                self.states.hold(state)
            seq.is_new = True
            seq.status = Status.PREFILL
            self.running.append(seq)
            if seq.num_cached < 0:  # once: a preempted sequence finding its own pages is no hit
                seq.num_cached = seq.num_computed
                if self.prefix is not None:
                    self.prefix.count(seq.num_prompt, seq.num_cached)

    def _resume(self, seq: Sequence, num_pages: int) -> None:
        """Lets a sequence go on whose pages were kept."""
        assert self._keeper is not None
        self.waiting.remove(seq)
        seq.num_computed = self._kept.pop(id(seq))
        seq.pages = self.pages.allocate(num_pages)
        seq.slot = heapq.heappop(self._free_slots)
        seq.state_from, seq.is_new = -1, True
        self._keeper.restore(seq, self.pages.pages_for(seq.num_computed))
        seq.status = Status.DECODE if seq.num_computed >= seq.num_prompt else Status.PREFILL
        self.running.append(seq)

    def _find(self, seq: Sequence) -> tuple[list[int], int]:
        """Pages with the beginning of the prompt, held, and the slot of the state after them (-1
        where the model has none); no pages where every token must be computed.
        """
        if self.prefix is None:
            return [], -1
        if seq.page_keys is None:
            request = seq.request
            seq.page_keys = self.prefix.page_keys(request.prompt_token_ids, request.cache_salt)
        seq.num_known_pages = 0
        if seq.wants_prompt_logprobs:
            return [], -1
        pages = self.prefix.hold(seq.page_keys, seq.num_prompt)
        if self.states is None:
            return pages, -1
        seq.num_known_pages = len(pages)
        usable, state = self.states.find(seq.page_keys[: len(pages)])
        pages, rest = pages[:usable], pages[usable:]
        self.pages.free(rest)
        return pages, state

    def _on_its_way(self, seq: Sequence, page_idx: int) -> Sequence | None:
        """An earlier sequence that is computing the page `seq` would have to compute first.

        Waiting for it costs nothing where prompts are computed one after the other; one that is
        streamed takes long, and those behind `seq` pass.
        """
        keys = seq.page_keys
        if (
            not keys
            or seq.wants_prompt_logprobs
            or (page_idx + 1) * self.pages.page_size >= seq.num_prompt
        ):
            return None
        for s in self.running:
            if s.status is Status.PREFILL and s.page_keys:
                if s.page_keys[page_idx:][:1] == [keys[page_idx]]:
                    return s
        return None

    def _publish(self, row: Row) -> None:
        """Shares the pages whose last position this prefill has written, and the states it kept."""
        if self.prefix is not None and row.seq.page_keys is not None:
            size = self.pages.page_size
            span = slice(row.start // size, (row.start + row.count) // size)
            self.prefix.publish(row.seq.page_keys[span], row.seq.pages[span])
            for position, slot in row.saves:
                assert self.states is not None
                self.states.publish(row.seq.page_keys[position // size - 1], slot)

    def _saves(self, seq: Sequence, start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The states worth keeping among those that a prefill of these tokens passes."""
        if self.states is None or self.prefix is None or not seq.page_keys:
            return ()
        size, saves = self.pages.page_size, []
        # Where prompts part, and where the prompt's next turn goes on.
        for num_pages in sorted({seq.num_known_pages, (seq.num_prompt - 1) // size}):
            position = num_pages * size
            if not start < position <= start + count:
                continue
            if seq.page_keys[num_pages - 1] not in self.states:
                slot = self.states.reserve()
                if slot >= 0:
                    saves.append((position, slot))
        return tuple(saves)

    def _release_state(self, seq: Sequence) -> None:
        """The sequence goes on from its own state, or ends."""
        if self.states is not None and seq.state_from >= 0:
            self.states.release(seq.state_from)
        seq.state_from = -1

    def _plan_stream(self, prefilling: list[Sequence]) -> StepPlan | None:
        """One more layer of the prompt that is streamed, or the first of the oldest that is to be;
        every second time a chunk of the others goes first. Its last token is left for an ordinary
        prefill, which draws.
        """
        if self._streaming is None:
            self._choose_stream(prefilling)
        seq = self._streaming
        if seq is None or (self._chunked(prefilling) and self._last_prefill == "stream"):
            self._last_prefill = "prefill"
            return None
        self._last_prefill = "stream"
        return self._stream_step(seq)

    def _next_pass(self, seq: Sequence) -> StreamedPass | None:
        """Of the tokens that are left to compute."""
        if seq.wants_prompt_logprobs:
            return None
        return self._streams(seq.num_prompt - seq.num_computed - 1)

    def _chunked(self, prefilling: list[Sequence]) -> list[Sequence]:
        """Those that neither are streamed nor wait for it."""
        return [s for s in prefilling if s is not self._streaming and self._next_pass(s) is None]

    def _plan_prefill(self, prefilling: list[Sequence]) -> StepPlan:
        streamed = None if self._aside else self._plan_stream(prefilling)
        if streamed is not None:
            return streamed
        if self._streaming is not None and not self._aside:
            prefilling = self._chunked(prefilling)
        prefilling = sorted(prefilling, key=self._turn)
        rows, room = [], self.prefill_chunk_tokens
        num_decoding = sum(s.status is Status.DECODE for s in self.running)
        if self._limits is not None and num_decoding:
            room = min(room, self._limits.chunk_tokens(num_decoding))
        if prefilling[0].wants_prompt_logprobs:
            prefilling, room = prefilling[:1], min(room, self._prompt_logprobs_tokens)
        else:
            prefilling = [s for s in prefilling if not s.wants_prompt_logprobs]
        for seq in prefilling:
            count = min(room, seq.num_prompt - seq.num_computed)
            if count == 0:
                break
            end = seq.num_computed + count
            rows.append(
                Row(
                    seq,
                    seq.num_computed,
                    count,
                    samples=end == seq.num_tokens,
                    saves=self._saves(seq, seq.num_computed, count),
                )
            )
            room -= count
        return StepPlan("prefill", tuple(rows))

    def _plan_decode(self) -> StepPlan:
        rows: list[Row] = []
        for seq in list(self.running):
            if seq.status is not Status.DECODE or not self._hold_page(seq):
                continue
            at = seq.num_computed
            rows.append(Row(seq, at, 1, samples=at + 1 == seq.num_tokens))
        rows = [r for r in rows if r.seq.status is Status.DECODE]
        if self.num_guesses:
            rows = [self._with_guesses(r) for r in rows]
        return StepPlan("decode", tuple(rows))

    def _with_guesses(self, row: Row) -> Row:
        """The row with as many of its sequence's guesses as may still become tokens of its text and
        as there are pages for without anybody giving way.
        """
        seq = row.seq
        if not row.samples or not seq.guesses:
            return row
        left = seq.request.max_tokens - len(seq.output_token_ids)
        count = min(1 + len(seq.guesses), 1 + self.num_guesses, left)
        room = (len(seq.pages) + self.pages.num_free) * self.pages.page_size
        count = max(min(count, room - row.start), 1)
        # Further guesses are made through positions of their own.
        end = min(row.start + count + self.num_guesses - 1, row.start + left, room)
        missing = self.pages.pages_for(max(end, row.start + count)) - len(seq.pages)
        if missing > 0:
            seq.pages += self.pages.allocate(missing)
        return dataclasses.replace(row, count=count)

    def _hold_page(self, seq: Sequence) -> bool:
        """Makes sure that the position to be written has a page; False when `seq` itself had to
        give way.
        """
        if seq.num_computed < len(seq.pages) * self.pages.page_size:
            return True
        while self.pages.num_free == 0:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        seq.pages += self.pages.allocate(1)
        return True

    def _preempt(self, seq: Sequence) -> None:
        assert len(self.running) > 1, "the pool holds at least one sequence of any admitted length"
        if self._keeper is not None and seq.num_computed and self._is_whole(seq):
            if self._keeper.keep(seq, self.pages.pages_for(seq.num_computed)):
                self._kept[id(seq)] = seq.num_computed
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)

    def _is_whole(self, seq: Sequence) -> bool:
        """Whether its pages are all that it goes on from: no recurrent state, and no log
        probabilities of its prompt that are half counted.
        """
        return self.states is None and seq.state_from < 0 and not seq.wants_prompt_logprobs

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        if seq is self._streaming:
            self._streaming = None
        self._release_state(seq)
        self.pages.free(seq.pages)
        heapq.heappush(self._free_slots, seq.slot)
        seq.slot, seq.guesses = -1, ()
