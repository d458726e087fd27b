"""One completion as it is written: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable

from jaxmoe.common.timing import Timings
from jaxmoe.decode.hybrid_step import RowResult
from jaxmoe.request import CompletionOutput, Delta, FinishReason, Sequence, TokenLogprob
from jaxmoe.text.detokenizer import Detokenizer
from jaxmoe.text.tokenizer import Tokenizer


class Completion:
    """A sequence with its text. `tokenizer` None: token ids only."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        params = seq.request.params
        self.seq = seq
        self._tokenizer = tokenizer
        self._text = Detokenizer(params.stop, include_stop=params.include_stop_str_in_output)
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self._is_first = True  # whether no delta was made yet
        self._stop_reason: str | int | None = None
        self.output: CompletionOutput | None = None

    def push(self, result: RowResult, now_s: float) -> Delta:
        """Takes the token a step drew. The delta's finish_reason says whether it was the last."""
        seq, request = self.seq, self.seq.request
        token = result.token_id
        if token < 0:
            return self._finish("", (), None, "error", now_s)
        if not seq.output_token_ids:
            seq.first_token_s = now_s
        seq.output_token_ids.append(token)
        entry = None
        if self._logprobs is not None:
            top = tuple(zip(result.top_ids, result.top_logprobs, strict=True))
            entry = TokenLogprob(token, result.logprob, top)
            self._logprobs.append(entry)
        grammar = seq.grammar
        if grammar is not None:
            grammar.accept(token)
        count = len(seq.output_token_ids)
        may_stop = count > request.params.min_tokens
        if may_stop and token in request.stop_ids:
            if token in request.params.stop_token_ids:
                self._stop_reason = token
            return self._finish("", (token,), entry, "stop", now_s)
        if grammar is not None and grammar.complete and token in grammar.eos_token_ids:
            return self._finish("", (token,), entry, "stop", now_s)  # also where eos is ignored
        text = ""
        if self._tokenizer is not None:
            skip = request.params.skip_special_tokens
            piece = self._tokenizer.token_bytes(token, skip_special_tokens=skip)
            text = self._text.push(piece, may_stop=count >= request.params.min_tokens)
        if self._text.stopped_by is not None:
            self._stop_reason = self._text.stopped_by
            return self._finish(text, (token,), entry, "stop", now_s)
        if grammar is not None and grammar.error is not None:
            self._stop_reason = f"the grammar failed: {grammar.error}"
            return self._finish(text, (token,), entry, "error", now_s)
        if grammar is not None and grammar.complete:
            return self._finish(text, (token,), entry, "stop", now_s)
        if count >= request.max_tokens:
            return self._finish(text, (token,), entry, "length", now_s)
        return self._delta(text, (token,), entry, None)

    def add_prompt_logprobs(self, start: int, entries: Iterable[TokenLogprob]) -> None:
        """Takes the entries of prompt tokens from position `start` on (1 at least), in order.

        After a preemption the same ones come again.
        """
        known = [None] if self.prompt_logprobs is None else self.prompt_logprobs[:start]
        assert len(known) == start
        self.prompt_logprobs = [*known, *entries]

    def fail(self, reason: str, now_s: float) -> Delta:
        """Ends it with an error of which `reason` is told the client."""
        self._stop_reason = reason
        return self._finish("", (), None, "error", now_s)

    def abort(self, now_s: float) -> Delta:
        """Ends it where it is; what was held back for a stop string is given out."""
        return self._finish("", (), None, "abort", now_s)

    def _finish(
        self,
        text: str,
        token_ids: tuple[int, ...],
        entry: TokenLogprob | None,
        reason: FinishReason,
        now_s: float,
    ) -> Delta:
        text += self._text.finish()
        if self._text.stopped_by is not None and self._stop_reason is None:
            self._stop_reason, reason = self._text.stopped_by, "stop"
        seq = self.seq
        self.output = CompletionOutput(
            index=seq.choice_idx,
            text=self._text.text,
            token_ids=tuple(seq.output_token_ids),
            finish_reason=reason,
            stop_reason=self._stop_reason,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            timings=Timings.of(
                prompt_tokens=seq.num_prompt,
                output_tokens=len(seq.output_token_ids),
                arrival_s=seq.request.arrival_s,
                started_s=seq.started_s or now_s,  # aborted in the queue
                first_token_s=seq.first_token_s or now_s,
                finished_s=now_s,
                cached_tokens=max(seq.num_cached, 0),
            ),
        )
        return self._delta(text, token_ids, entry, reason)

    def _delta(
        self,
        text: str,
        token_ids: tuple[int, ...],
        entry: TokenLogprob | None,
        reason: FinishReason | None,
    ) -> Delta:
        logprobs = None
        if self._logprobs is not None:
            logprobs = () if entry is None else (entry,)
        prompt_logprobs = None
        if self._is_first and self.prompt_logprobs is not None:
            prompt_logprobs = tuple(self.prompt_logprobs)
        self._is_first = False
        return Delta(
            self.seq.request.request_id,
            self.seq.choice_idx,
            text,
            token_ids,
            logprobs,
            reason,
            prompt_logprobs=prompt_logprobs,
            stop_reason=None if reason is None else self._stop_reason,
        )
