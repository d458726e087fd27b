"""The engine: requests in, steps, deltas out. One step at a time, driven by whoever calls `step`.

Order of a step: the scheduler says who takes part, the compiled step computes and draws, each
drawn token goes to its completion, and finished sequences give their pages back before the next
plan. A failing step leaves the caches undefined, so the engine is dead afterwards and says why.
What it does not do: threads, weights (see start.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxmoe.common.errors import EngineDeadError, RequestError
from jaxmoe.config.generation import GenerationDefaults
from jaxmoe.decode.batch import StepRow
from jaxmoe.decode.hybrid_step import LOGITS_CHUNK_TOKENS, Kind, RowResult
from jaxmoe.engine.aside_prompt import WAIT_S, AsidePrompt, Worker
from jaxmoe.engine.async_engine import EngineInfo, PrefillProgress
from jaxmoe.engine.checks import check_params, check_prompt, resolve_max_tokens
from jaxmoe.engine.completion import Completion
from jaxmoe.engine.profile import KINDS, StepProfile
from jaxmoe.engine.stats import Stats
from jaxmoe.engine.streamed_prompt import StreamedPrompt, Streamer
from jaxmoe.engine.warm_up import NO_FIGURES, WarmUp
from jaxmoe.ffi.registry import NATIVE_ERRORS
from jaxmoe.kv_cache.layout import CacheLayout, StateLayout
from jaxmoe.kv_cache.pages import PageAllocator
from jaxmoe.kv_cache.prefix import PrefixCache
from jaxmoe.kv_cache.states import StateCache
from jaxmoe.request import NOT_FINITE, Delta, Request, RequestOutput, Status
from jaxmoe.request import Sequence as RequestSequence
from jaxmoe.sampling.grammar import GrammarCompiler, SequenceGrammar
from jaxmoe.sampling.inputs import RowSettings
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.scheduler.draft_policy import DraftPolicy
from jaxmoe.scheduler.prefill_route import Path, PrefillRoute
from jaxmoe.scheduler.scheduler import Keeper, Row, Scheduler, StepPlan
from jaxmoe.scheduler.tpot_target import TpotTarget
from jaxmoe.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What the engine needs of the compiled step (decode/hybrid_step.py)."""

    @property
    def usable(self) -> bool: ...
    @property
    def last_compiled(self) -> bool: ...
    def assign(self, slot: int, seen: Sequence[int] = ()) -> None: ...
    def run(
        self, kind: Kind, rows: Sequence[StepRow], *, num_guesses: int = 0
    ) -> list[RowResult]: ...
    def logits(self, token_ids: Sequence[int], pages: Sequence[int], slot: int) -> np.ndarray: ...


class Engine:
    """Not thread-safe; `LLM` holds a lock around it.

    Args:
        runner: the compiled step.
        layout: of the cache the runner was made with.
        tokenizer: None where texts are not wanted; requests are token ids then.
        vocab_size: of the model (the tokenizer's may differ).
        eos_token_ids: end of text, unless a request ignores it.
        defaults: what requests that say nothing get.
        seed: where the seeds of requests that bring none start.
        drafts: how many guesses of the model's draft head are verified; None: it is not run.
        counters: of the native runtime (`CpuRuntime.stats`), for figures.
        profile: counts where the time of steps goes (profile.py).
        streamer, route: what computes long prompts with their experts streamed, and which prompts
            it is to compute.
        worker: computes them on a device of its own meanwhile (prefill_worker.py), in the
            streamer's place.
        keeper: of the pages of preempted sequences; None: they are computed again.
        target: of the time per token, which limits the batch; None: max_num_seqs alone does.
        throttle: told whether others decode, whenever that changes while a prompt is streamed.
        prefix_cache: share pages of prompts that begin alike (kv_cache/prefix.py).
        states: slots of recurrent state, for models that have it; their prompts share pages only
            where some slots are for kept states (kv_cache/states.py).
    """

    def __init__(
        self,
        runner: StepRunner,
        layout: CacheLayout,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        max_num_seqs: int,
        prefill_chunk_tokens: int,
        defaults: GenerationDefaults | None = None,
        seed: int = 0,
        prefix_cache: bool = True,
        streamer: Streamer | None = None,
        route: PrefillRoute | None = None,
        worker: Worker | None = None,
        throttle: Callable[[bool], None] | None = None,
        target: TpotTarget | None = None,
        keeper: Keeper | None = None,
        states: StateLayout | None = None,
        drafts: DraftPolicy | None = None,
        counters: Callable[[], Mapping[str, int]] = dict,
        profile: StepProfile | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """on_plan may be set: told what a step will compute, before it does. warm_up too: what
        compiles ahead.
        """
        self.layout = layout
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.eos_token_ids = tuple(eos_token_ids)
        self.defaults = defaults or GenerationDefaults()
        self.pages = PageAllocator(layout.num_pages, layout.page_size)
        kept = None
        if states is not None:
            prefix_cache = prefix_cache and states.num_kept > 0
            kept = StateCache(states.num_running, states.num_kept) if prefix_cache else None
        self.prefix = PrefixCache(self.pages) if prefix_cache else None
        self._route = route
        self._chunk_token_s = 0.0  # measured, where no route does
        self.scheduler = Scheduler(
            self.pages,
            max_num_seqs=max_num_seqs,
            prefill_chunk_tokens=prefill_chunk_tokens,
            prefix=self.prefix,
            states=kept,
            prompt_logprobs_tokens=LOGITS_CHUNK_TOKENS,
            streams=None if route is None else route.next_pass,
            aside=worker is not None,
            predict=self._predict_prompt,
            limits=target,
            keeper=None if states is not None else keeper,
        )
        self._target = target
        self._drafts = drafts
        self._aside = None if worker is None else AsidePrompt(worker)
        self._throttle = throttle
        self._throttled = False
        self._pass_throttled = False  # whether it was at any time of the present streamed pass
        self._pass_begun_s = 0.0
        self._streamed = None if streamer is None else StreamedPrompt(streamer)
        self.grammars = None
        if tokenizer is not None:
            self.grammars = GrammarCompiler.of(
                tokenizer, eos_token_ids=self.eos_token_ids, vocab_size=vocab_size
            )
        self._runner = runner
        self._clock = clock
        self._counters = counters
        self.profile = profile
        self._stats = Stats()
        self._seeds = (seed + 0x9E3779B97F4A7C15 * i for i in itertools.count())
        self._ids = (f"req-{i}" for i in itertools.count())
        self._completions: dict[str, list[Completion]] = {}
        self._progress: list[PrefillProgress] = []
        self._dead: str | None = None
        self.on_plan: Callable[[StepPlan], None] = lambda plan: None
        self.warm_up: WarmUp | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        cache_salt: str | None = None,
    ) -> str:
        """Queues a request and returns its id; a RequestError leaves the engine as it was.

        Args:
            prompt_token_ids: not empty, all in the vocabulary.
            params: default: what the checkpoint recommends.
            request_id: unique among unfinished requests; default: a fresh one.
            prompt: the text the ids came from, handed through to the output.
            cache_salt: prefixes are shared only among requests of the same salt.
        """
        self._check_alive()
        request_id = next(self._ids) if request_id is None else request_id
        if request_id in self._completions:
            raise RequestError(f"request_id: {request_id!r} is in use; choose another")
        request = self._make_request(request_id, prompt_token_ids, params, prompt, cache_salt)
        # Grammars may fail: all are made before anything is queued.
        self.prepare(request.params)
        seqs = [
            RequestSequence(request, choice_idx=i, grammar=self._grammar(request))
            for i in range(request.params.n)
        ]
        self._completions[request_id] = [Completion(seq, self.tokenizer) for seq in seqs]
        for seq in seqs:
            self.scheduler.add(seq)
        return request_id

    def prepare(self, params: SamplingParams) -> None:
        """Compiles a request's grammar; RequestError where that fails. Thread-safe: called from
        another thread first, it keeps the time that takes (usually milliseconds, at worst
        `grammar_check.CHECK_TIMEOUT_S` and a start) out of the steps.
        """
        if params.structured is not None:
            if self.grammars is None:
                raise RequestError("structured output: this engine has no tokenizer")
            self.grammars.prepare(params.structured)

    def _grammar(self, request: Request) -> SequenceGrammar | None:
        spec = request.params.structured
        return None if spec is None or self.grammars is None else self.grammars.matcher(spec)

    def abort(self, request_id: str) -> list[Delta]:
        """Ends a request wherever it is; pages and slots are free at once. Unknown ids do nothing.

        Returns the last deltas of its unfinished completions, finish_reason "abort"; the last one
        carries the output.
        """
        now = self._clock()
        completions = self._completions.get(request_id, [])
        deltas = []
        for completion in completions:
            if completion.output is None:
                self.scheduler.cancel(completion.seq)
                deltas.append(self._close_request(completion, completion.abort(now)))
        if self._aside is not None:  # there may be no step for a while
            self._aside.drop_stale()
        return deltas

    def wake(self) -> None:
        """Ends a step that waits for the prefill worker alone; from any thread."""
        if self._aside is not None:
            self._aside.worker.wake()

    def step(self) -> list[Delta]:
        """Computes one step; what it added to each completion it completed a token of."""
        self._check_alive()
        if self.profile is None:
            return self._step()[1]
        self.profile.begin()
        plan, deltas = self._step()
        # A prompt whose experts are streamed is many programs, which nothing splits.
        if plan is not None and plan.kind in KINDS:
            self.profile.end(plan.kind, tokens=plan.num_tokens, compiled=self._runner.last_compiled)
        return deltas

    def _step(self) -> tuple[StepPlan | None, list[Delta]]:
        if self._streamed is not None:
            self._streamed.drop_stale()
        ended = self._take_in()
        self._set_throttle()
        if self._drafts is not None:
            self.scheduler.num_guesses = self._choose_guesses(self._drafts)
        plan = self.scheduler.plan()
        if plan is None:
            if self._aside is not None and self._aside.plan is not None:
                self._aside.worker.wait(WAIT_S)
            return None, ended
        self.on_plan(plan)
        if plan.kind == "stream":
            return plan, ended + self._stream(plan)
        return plan, ended + self._compute(plan)

    def _choose_guesses(self, drafts: DraftPolicy) -> int:
        decoding = [s for s in self.scheduler.running if s.status is Status.DECODE]
        if all(map(undrafted, decoding)):
            return 0
        return drafts.choose(len(decoding))

    def _learn(self, plan: StepPlan, seconds: float) -> None:
        """Corrects what prompts and batches are expected to take."""
        if self._drafts is not None and plan.kind == "decode":
            self._drafts.observe_step(
                len(plan.rows), plan.num_tokens, self.scheduler.num_guesses, seconds
            )
        if self._target is not None:
            self._target.observe(plan.kind, plan.num_tokens, seconds)
        # Small chunks mislead.
        if plan.kind == "prefill" and plan.num_tokens == self.scheduler.prefill_chunk_tokens:
            if self._route is not None:
                self._route.observe("chunked", plan.num_tokens, seconds)
            old, new = self._chunk_token_s, seconds / plan.num_tokens
            self._chunk_token_s = new if not old else old + 0.3 * (new - old)

    def _predict_prompt(self, num_tokens: int) -> float:
        """Seconds that a prompt is expected to take; 0 before anything was measured."""
        if self._route is not None:
            return self._route.predict_s(self._route.choose(num_tokens), num_tokens)
        return num_tokens * self._chunk_token_s

    def _set_throttle(self) -> None:
        """Streaming leaves bandwidth to those who decode, if it was asked to."""
        if self._throttle is None:
            return
        decoding = any(s.status is Status.DECODE for s in self.scheduler.running)
        if decoding != self._throttled:
            self._throttle(decoding)
            self._throttled = decoding
        self._pass_throttled |= decoding

    def _compute(self, plan: StepPlan) -> list[Delta]:
        """A step of the compiled program, with a token for every row that draws."""
        assert plan.kind != "stream"
        now = self._clock()
        for row in plan.rows:
            if row.seq.is_new:
                # Tokens found in the prefix cache are never fed, but penalties count them.
                counted = row.start if row.seq.request.params.adjusts_logits else 0
                self._runner.assign(row.seq.slot, row.seq.request.prompt_token_ids[:counted])
            if not row.seq.started_s:
                self._note_start(row.seq, "chunked", now)
        disturbed = self._warming
        try:
            results = self._runner.run(
                plan.kind, _step_rows(plan), num_guesses=self._num_guesses(plan)
            )
        except BaseException as e:
            self._note_failure(e)
            raise
        right = [len(result.more) for result in results] if plan.kind == "decode" else ()
        self.scheduler.advance(plan, right)
        self._note_progress(plan)
        for row, result in zip(plan.rows, results, strict=True):
            if result.prompt_logprobs is not None:
                completion = self._completions[row.seq.request.request_id][row.seq.choice_idx]
                completion.add_prompt_logprobs(row.start + 1, result.prompt_logprobs)
        started, now = now, self._clock()
        compiled = self._runner.last_compiled
        self._stats.note_step(plan, now - started, self._counters(), compiled=compiled)
        if not compiled and not disturbed and not self._warming:
            self._learn(plan, now - started)
        if self._drafts is not None:
            self._note_drafts(plan, results, self._drafts)
        deltas = []
        for row, result in zip(plan.rows, results, strict=True):
            if row.samples:
                deltas += self._take(row, result, now)
        return deltas

    def _num_guesses(self, plan: StepPlan) -> int:
        """Of each row, to be made; always the same after prompts, which would else be computed by
        more programs.
        """
        if self._drafts is None:
            return 0
        return self.scheduler.num_guesses if plan.kind == "decode" else self._drafts.most_guesses

    def _note_drafts(
        self, plan: StepPlan, results: Sequence[RowResult], drafts: DraftPolicy
    ) -> None:
        """Counts what was verified, and keeps the guesses of those that may have some."""
        for row, result in zip(plan.rows, results, strict=True):
            if not row.samples:
                continue
            why_not = undrafted(row.seq)
            row.seq.guesses = () if why_not else result.guesses
            if plan.kind == "decode":
                verified, right = row.count - 1, len(result.more)
                drafts.observe_guesses(verified, right)
                self._stats.note_guesses(verified, right, why_not)
        self._stats.note_draft_policy(self.scheduler.num_guesses, drafts.rate)

    def _stream(self, plan: StepPlan) -> list[Delta]:
        """One more layer of a long prompt, or all of them handed to the worker."""
        row, now = plan.rows[0], self._clock()
        begun = self._streamed is not None and self._streamed.seq is row.seq
        if not begun:
            if row.seq.is_new:
                self._runner.assign(row.seq.slot)
                row.seq.is_new = False
            if not row.seq.started_s:
                self._note_start(row.seq, plan.path, now)
            self._pass_throttled = self._throttled
            self._pass_begun_s = now
            if self._aside is not None:
                self._aside.begin(plan, _step_rows(plan)[0], now)
                return []
            assert self._streamed is not None
            self._streamed.begin(row.seq, _step_rows(plan)[0], plan.path)
        assert self._streamed is not None
        try:
            done = self._streamed.advance()
        except BaseException as e:
            return self._stream_failed(row, e)
        seconds = self._clock() - now
        self._streamed.seconds += seconds
        if done < 1:
            took = now + seconds - self._pass_begun_s
            self._note_part(row, done, self._streamed.num_layers, took)
            self._stats.note_layer(seconds)
            return []
        total = self._streamed.seconds
        self._streamed.drop()
        self._stream_ended(plan, total, seconds)
        return []

    def _take_in(self) -> list[Delta]:
        """What the worker has ready: its layers reach the caches here, between two steps."""
        aside = self._aside
        if aside is None:
            return []
        aside.drop_stale()
        plan = aside.plan
        if plan is None:
            return []
        try:
            done = aside.poll()
        except BaseException as e:
            if not aside.worker.usable:
                self._note_failure(e)
                raise
            return self._stream_failed(plan.rows[0], e)
        if done < 1:
            assert self._route is not None
            took = done * self._route.predict_s(plan.path, plan.rows[0].count)
            self._note_part(plan.rows[0], done, aside.worker.num_layers, took)
            return []
        aside.drop()
        self._stream_ended(plan, self._clock() - aside.begun_s, 0.0)
        return []

    def _stream_failed(self, row: Row, e: BaseException) -> list[Delta]:
        """A load that fails is that request's failure alone."""
        if not isinstance(e, NATIVE_ERRORS) or not self._runner.usable:
            self._note_failure(e)
            raise e
        completion = self._completions[row.seq.request.request_id][row.seq.choice_idx]
        delta = completion.fail(f"the prompt could not be computed: {e}", self._clock())
        self.scheduler.cancel(row.seq)
        _log.error("request %s: %s", row.seq.request.request_id, delta.stop_reason)
        return [self._close_request(completion, delta)]

    def _stream_ended(self, plan: StepPlan, total_s: float, step_s: float) -> None:
        """total_s: since its first layer began. step_s: of the engine's time, not noted yet."""
        row = plan.rows[0]
        self._note_stream(row, plan.path, total_s)
        if row.seq.request.params.adjusts_logits:
            end = row.start + row.count
            tokens = row.seq.request.prompt_token_ids[:end]
            self._runner.assign(row.seq.slot, tokens)
        self.scheduler.advance(plan)
        self._note_progress(plan)
        self._stats.note_step(plan, step_s, self._counters(), compiled=False)

    def _note_part(self, row: Row, done: float, num_layers: int, took_s: float) -> None:
        """Of a streamed pass so much is done, which took so long."""
        computed = row.start + int(row.count * done)
        left_s = 0.0
        if done > 0:
            left_s = took_s * (1 - done) / done
            left_s += self._predict_prompt(row.seq.num_prompt - row.start - row.count)
        self._progress = [
            PrefillProgress(
                row.seq.request.request_id,
                computed,
                row.seq.num_prompt,
                min(round(done * (num_layers + 1)), num_layers),
                num_layers,
                left_s,
            )
        ]

    def _note_start(self, seq: RequestSequence, path: Path, now: float) -> None:
        """A prompt's first step: which way it goes and when its first token is expected."""
        seq.started_s = now
        if self._route is not None:
            seq.prefill_path = path
            queued_s = now - seq.request.arrival_s
            left = seq.num_prompt - seq.num_computed
            seq.predicted_ttft_s = queued_s + self._route.predict_s(path, left)

    def _note_stream(self, row: Row, path: Path, seconds: float) -> None:
        assert self._route is not None
        predicted = self._route.predict_s(path, row.count)
        if not self._pass_throttled:  # what it takes then says nothing about the bus
            self._route.observe(path, row.count, seconds)
        _log.info(
            "request %s: %d prompt tokens by %s, predicted %.2f s, took %.2f s",
            row.seq.request.request_id,
            row.count,
            path,
            predicted,
            seconds,
        )

    def take_progress(self) -> list[PrefillProgress]:
        """How far the prompts of the last step are, each request's first completion; once."""
        progress, self._progress = self._progress, []
        return progress

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Float32 logits `[T, V]` after every token of a text; needs a free slot and pages."""
        self._check_alive()
        check_prompt(token_ids, self.vocab_size)
        if len(token_ids) > self.layout.max_model_len:
            raise RequestError(
                f"got {len(token_ids)} tokens, wanted at most {self.layout.max_model_len} "
                "(max_model_len); shorten the text or, if the model's limit allows, raise it"
            )
        with self.scheduler.borrow(len(token_ids)) as (pages, slot):
            try:
                return self._runner.logits(token_ids, pages, slot)
            except BaseException as e:
                self._note_failure(e)
                raise

    def resolve_max_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """Longest output of a request; RequestError with both numbers where it does not fit."""
        return resolve_max_tokens(
            num_prompt,
            params,
            max_model_len=self.layout.max_model_len,
            default=self.defaults.max_tokens,
        )

    def info(self, model: str, report: str = "") -> EngineInfo:
        """What a front is told about this engine."""
        return EngineInfo(
            model=model,
            vocab_size=self.vocab_size,
            max_model_len=self.layout.max_model_len,
            max_num_seqs=self.max_num_seqs,
            num_pages=self.layout.num_pages,
            page_size=self.layout.page_size,
            eos_token_ids=self.eos_token_ids,
            default_params=self.defaults.params,
            report=report,
            default_max_tokens=self.defaults.max_tokens,
            has_tokenizer=self.tokenizer is not None,
        )

    def stats(self) -> dict[str, float]:
        """Figures as of the last step (stats.py); always the same names in the same order."""
        figures = self._stats.snapshot(self.scheduler, self.pages, self.prefix)
        figures |= NO_FIGURES if self.warm_up is None else self.warm_up.snapshot()
        return figures if self.profile is None else figures | self.profile.snapshot()

    @property
    def _warming(self) -> bool:
        return self.warm_up is not None and self.warm_up.compiling

    def set_read_ceiling(self, bytes_per_s: float) -> None:
        """What the machine could read; for figures."""
        self._stats.read_ceiling = bytes_per_s

    @property
    def longest_step_s(self) -> float:
        """Of all steps so far."""
        return self._stats.longest_step_s

    def _note_progress(self, plan: StepPlan) -> None:
        self._progress = [
            PrefillProgress(
                seq.request.request_id,
                seq.num_computed,
                seq.num_prompt,
                left_s=self._predict_prompt(max(seq.num_prompt - seq.num_computed, 0)),
            )
            for seq in (row.seq for row in plan.rows if plan.kind != "decode")
            if seq.choice_idx == 0
        ]

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(
                f"the engine stopped at a failed step ({self._dead}); make a new one"
            )

    def _note_failure(self, e: BaseException) -> None:
        # An interrupt (Ctrl-C) between steps leaves everything in order: the step is planned again.
        if isinstance(e, Exception) or not self._runner.usable:
            self._dead = f"{type(e).__name__}: {e}"

    def _make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None,
        prompt: str | None,
        cache_salt: str | None,
    ) -> Request:
        params = self.defaults.params if params is None else params
        check_prompt(prompt_token_ids, self.vocab_size)
        check_params(params, self.vocab_size, has_tokenizer=self.tokenizer is not None)
        max_tokens = self.resolve_max_tokens(len(prompt_token_ids), params)
        eos = () if params.ignore_eos else self.eos_token_ids
        seed = next(self._seeds) if params.seed is None else params.seed
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            max_tokens=max_tokens,
            stop_ids=frozenset(eos) | frozenset(params.stop_token_ids),
            seed=seed & (2**64 - 1),
            arrival_s=self._clock(),
            prompt=prompt,
            cache_salt=cache_salt,
        )

    def _take(self, row: Row, result: RowResult, now: float) -> list[Delta]:
        """The row's draw and those after its right guesses, to the first that ends the text."""
        deltas = []
        for drawn in (result, *result.more):
            deltas.append(self._take_one(row, drawn, now))
            if deltas[-1].finish_reason is not None:
                break
        return deltas

    def _take_one(self, row: Row, result: RowResult, now: float) -> Delta:
        request = row.seq.request
        completion = self._completions[request.request_id][row.seq.choice_idx]
        delta = completion.push(result, now)
        self._stats.note_tokens(len(delta.token_ids))
        if delta.token_ids and len(row.seq.output_token_ids) == 1:
            self._stats.note_first_token(now - request.arrival_s)
        if delta.finish_reason is None:
            return delta
        self.scheduler.cancel(row.seq)
        if delta.finish_reason == "error":
            _log.error(
                "request %s: %s after %d tokens",
                request.request_id,
                delta.stop_reason or NOT_FINITE,
                row.seq.num_tokens,
            )
        return self._close_request(completion, delta)

    def _close_request(self, completion: Completion, delta: Delta) -> Delta:
        """The delta of a completion that ended, with the output if it was the request's last."""
        request, output = completion.seq.request, completion.output
        assert output is not None and delta.finish_reason is not None
        self._stats.note_finished(
            output.timings, delta.finish_reason, completion.seq.num_preemptions
        )
        completions = self._completions[request.request_id]
        if any(c.output is None for c in completions):
            return delta
        del self._completions[request.request_id]
        outputs = tuple(c.output for c in completions if c.output is not None)
        for output in outputs:
            t = output.timings
            _log.info(
                "request %s[%d]: %d + %d tokens, ttft %.3f s%s, tpot %.4f s, %s",
                request.request_id,
                output.index,
                t.prompt_tokens,
                t.output_tokens,
                t.ttft_s,
                _describe_path(completions[output.index].seq),
                t.tpot_s,
                output.finish_reason,
            )
        known = completions[0].prompt_logprobs
        done = RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            outputs,
            None if known is None else tuple(known),
        )
        return dataclasses.replace(delta, output=done)


def _describe_path(seq: RequestSequence) -> str:
    if not seq.prefill_path:
        return ""
    return f" ({seq.prefill_path}, predicted {seq.predicted_ttft_s:.3f} s)"


def _step_rows(plan: StepPlan) -> list[StepRow]:
    rows, end = [], 0
    for row in plan.rows:
        seq = row.seq
        request, params = seq.request, seq.request.params
        following, guesses = -1, ()
        adjusts = params.adjusts_logits
        end += row.count if plan.kind != "decode" else 1
        settings = RowSettings(
            params=params,
            logit_index=end - 1,
            seed=request.seed,
            choice_idx=seq.choice_idx,
            token_idx=len(seq.output_token_ids),
            slot=seq.slot if adjusts else -1,
            num_prompt=seq.num_prompt,
        )
        if row.start < seq.num_prompt:
            tokens = request.prompt_token_ids[row.start : row.start + row.count]
        else:
            tokens = (seq.token(row.start),)
            guesses = seq.guesses[: row.count - 1]
        mask = _mask(seq) if row.samples and seq.grammar is not None else None
        biases = _biases(seq, masked=mask is not None) if adjusts else None
        if not row.samples and row.start + row.count < seq.num_tokens:
            following = seq.token(row.start + row.count)
        targets = None
        if plan.kind == "prefill" and seq.wants_prompt_logprobs:
            targets = request.prompt_token_ids[row.start + 1 : row.start + row.count + 1]
        rows.append(
            StepRow(
                tokens,
                row.start,
                seq.pages,
                seq.slot,
                settings,
                biases,
                mask=mask,
                targets=targets,
                guesses=guesses,
                following=following,
                state_from=seq.state_from,
                saves=[(position - row.start - 1, slot) for position, slot in row.saves],
            )
        )
    return rows


def undrafted(seq: RequestSequence) -> str:
    """Why a sequence has no guesses: its next draws' logits depend on the draws before them beyond
    the model. Empty where it has.
    """
    if seq.grammar is not None:
        return "grammar"
    return "adjusted_logits" if seq.request.params.adjusts_logits else ""


def _mask(seq: RequestSequence) -> np.ndarray | None:
    """The tokens that the sequence's grammar allows next. Ends of text are left out before
    min_tokens and where they are ignored, unless the grammar allows nothing else.
    """
    request, grammar = seq.request, seq.grammar
    assert grammar is not None
    banned: set[int] = set()
    if len(seq.output_token_ids) < request.params.min_tokens:
        banned |= request.stop_ids | grammar.eos_token_ids
    elif request.params.ignore_eos:
        banned |= grammar.eos_token_ids - set(request.params.stop_token_ids)
    return grammar.mask(banned)


def _biases(seq: RequestSequence, *, masked: bool) -> dict[int, float]:
    """The request's own biases, and bans of everything that would end the text before
    min_tokens (a mask bans it itself, where the grammar can go on).
    """
    params = seq.request.params
    biases = dict(params.logit_bias)
    if not masked and len(seq.output_token_ids) < params.min_tokens:
        biases |= dict.fromkeys(seq.request.stop_ids, -math.inf)
    return biases
