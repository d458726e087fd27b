"""The door for Python programs: `LLM` loads a model and answers.

    with LLM() as llm:                                    # the embedded demo model
        print(llm.generate("In the beginning").text)

It runs the engine in the calling thread. Calls from several threads share the engine: whoever
waits for tokens drives the steps, and everybody's sequences are decoded together.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.common.errors import EngineDeadError, JaxMoeError, RequestError
from jaxmoe.common.fields import shown
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.async_engine import PrefillProgress
from jaxmoe.engine.engine import Engine
from jaxmoe.request import Delta, RequestOutput, failure
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.text.chat_template import ChatTemplate, check_messages
from jaxmoe.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
OnPrefill = Callable[[PrefillProgress], None]


class Outputs(list[RequestOutput]):
    """The outputs in the order of the prompts; `.text` is the first one's."""

    @property
    def text(self) -> str:
        return self[0].text


class LLM:
    """A loaded model.

    Args:
        model: checkpoint directory; None is the embedded demo model.
        engine_config: fields of `EngineConfig` (compute_dtype, max_model_len, max_num_seqs ...).

    Raises:
        ConfigError, CheckpointError, CapacityError: before or while loading, naming what to change.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **engine_config: Any) -> None:
        self._start(EngineConfig.of({"model": model, **engine_config}))

    @classmethod
    def of(cls, config: EngineConfig) -> LLM:
        """A model loaded by a finished config."""
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        from jaxmoe.engine.start import start  # loads the native extension

        started = start(config)
        self._init(started.engine, started.tokenizer, started.chat_template)
        self.config = started.config
        self.model_config = started.model_config
        self.report = started.report
        self._started = started
        if started.engine.warm_up is not None:
            started.engine.warm_up.start()

    @classmethod
    def on_engine(
        cls, engine: Engine, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None = None
    ) -> LLM:
        """The same door on an engine that was made elsewhere; `close` leaves that engine alone."""
        llm = cls.__new__(cls)
        llm._init(engine, tokenizer, chat_template)
        llm._started = None
        return llm

    def _init(
        self, engine: Engine, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._engine: Engine | None = engine
        self._lock = threading.RLock()
        self._mail: dict[str, collections.deque[Delta]] = {}
        self._on_prefill: dict[str, OnPrefill] = {}

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise EngineDeadError("this LLM was closed; make a new one")
        return self._engine

    @property
    def default_params(self) -> SamplingParams:
        """What a request without SamplingParams gets: the checkpoint's recommendation."""
        return self.engine.defaults.params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        on_prefill: OnPrefill | None = None,
    ) -> Outputs:
        """Completes one prompt or many, decoded together.

        Args:
            prompts: a text, a list of texts, a list of token ids, or a list of such lists.
            sampling_params: for all, or one for each; default: what the checkpoint recommends.
            on_prefill: told how far each prompt is, after every step or layer of it: tokens, the
                layer of a streamed prompt, seconds left. Called in whichever thread drives the
                engine just then, while that waits; it must not call this object.

        Returns:
            One RequestOutput a prompt, in their order (also for a single prompt).

        Raises:
            RequestError: before anything is computed, for the first prompt that cannot be served.
        """
        asked = [self._tokenize(p) for p in _as_prompts(prompts)]
        return self._generate(asked, sampling_params, on_prefill)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        *,
        on_prefill: OnPrefill | None = None,
        **template_args: Any,
    ) -> Outputs:
        """Answers one conversation (a list of messages) or many (a list of such lists).

        on_prefill: as of `generate`. template_args: switches of the chat template, such as
        enable_thinking.
        """
        many = (
            bool(messages)
            and isinstance(messages, Sequence)
            and all(isinstance(m, Sequence) and not isinstance(m, (str, bytes)) for m in messages)
        )
        conversations = messages if many else [messages]
        prompts = [self._apply_template(m, template_args) for m in conversations]
        return self._generate(prompts, sampling_params, on_prefill)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], /, **template_args: Any
    ) -> list[int]:
        """Token ids of a conversation's prompt, as `chat` sends them."""
        return list(self._apply_template(messages, template_args)[1])

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as `generate` sends them."""
        return list(self._tokenize(prompt)[1])

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        on_prefill: OnPrefill | None = None,
    ) -> Stream:
        """Deltas of one prompt's completions as they are written; the last one carries the output.

        on_prefill: as of `generate`. The request is checked and queued at once. Leaving the
        iterator early cancels it.
        """
        prompts = _as_prompts(prompt)
        if len(prompts) != 1:
            raise RequestError(
                f"prompt: got {len(prompts)} prompts, wanted one; call stream for each, or generate"
            )
        text, ids = self._tokenize(prompts[0])
        (params,) = _as_params(sampling_params, 1)
        return Stream(self, self._add(ids, params, text, on_prefill))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Float32 logits `[T, V]` after every one of T tokens, for audits."""
        with self._lock:
            return self.engine.logits(_plain_ids(token_ids))

    def close(self) -> None:
        """Gives the model's memory back. Further calls raise EngineDeadError."""
        with self._lock:
            started, self._started, self._engine = self._started, None, None
            if started is not None:
                started.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if not isinstance(prompt, str):
            return None, _plain_ids(prompt)
        tokenizer = self._need_tokenizer()
        if not prompt:
            raise RequestError("the prompt is empty; wanted at least one character")
        return prompt, tokenizer.encode(prompt)

    def _apply_template(
        self, messages: Sequence[Mapping[str, Any]], template_args: Mapping[str, Any]
    ) -> tuple[str, Sequence[int]]:
        check_messages(messages)
        tokenizer = self._need_tokenizer()
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template; use generate with a prompt instead of chat"
            )
        text = self.chat_template.render(messages, **template_args)
        return text, tokenizer.encode(text, add_special_tokens=False)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model has no known tokenizer; give token ids instead of text")
        return self.tokenizer

    def _generate(
        self,
        prompts: Sequence[tuple[str | None, Sequence[int]]],
        sampling_params: Params,
        on_prefill: OnPrefill | None,
    ) -> Outputs:
        params = _as_params(sampling_params, len(prompts))
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            with self._lock:
                for (text, token_ids), p in zip(prompts, params, strict=True):
                    ids.append(self._add(token_ids, p, text, on_prefill))
            for request_id in ids:
                for delta in Stream(self, request_id):
                    if delta.output is not None:
                        done[request_id] = _without_errors(delta.output)
        finally:
            self._forget(i for i in ids if i not in done)
        return Outputs(done[i] for i in ids)

    def _add(
        self,
        ids: Sequence[int],
        params: SamplingParams | None,
        text: str | None,
        on_prefill: OnPrefill | None,
    ) -> str:
        with self._lock:
            request_id = self.engine.add_request(ids, params, prompt=text)
            self._mail[request_id] = collections.deque()
            if on_prefill is not None:
                self._on_prefill[request_id] = on_prefill
            return request_id

    def _next(self, request_id: str) -> Delta:
        """The request's next delta; drives the engine, for everybody, until there is one."""
        with self._lock:
            mail = self._mail[request_id]
            while not mail:
                for delta in self.engine.step():
                    self._mail[delta.request_id].append(delta)
                if self._on_prefill:
                    for progress in self.engine.take_progress():
                        if progress.request_id in self._on_prefill:
                            self._on_prefill[progress.request_id](progress)
            return mail.popleft()

    def _forget(self, request_ids: Any) -> None:
        """Cancels what is still running of these requests and drops their mail."""
        with self._lock:
            for request_id in request_ids:
                self._on_prefill.pop(request_id, None)
                if self._mail.pop(request_id, None) is not None and self._engine is not None:
                    self._engine.abort(request_id)


class Stream(Iterator[Delta]):
    """The deltas of one request; ends after the one that carries the output.

    Closing it, or dropping it before the end, cancels the request.
    """

    def __init__(self, llm: LLM, request_id: str) -> None:
        self.request_id = request_id
        self._llm: LLM | None = llm

    def __next__(self) -> Delta:
        if self._llm is None:
            raise StopIteration
        try:
            delta = self._llm._next(self.request_id)
        except BaseException:
            self.close()
            raise
        if delta.output is not None:
            self.close()
        return delta

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm._forget([self.request_id])

    def __del__(self) -> None:
        self.close()


def _as_prompts(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts: got {shown(prompts)}, wanted a text, a list of texts, token ids, or a "
            "list of lists of token ids"
        )
    if not len(prompts):
        raise RequestError("prompts: got an empty list, wanted at least one prompt")
    nested = [isinstance(p, (str, Sequence, np.ndarray)) for p in prompts]
    if not any(nested):
        return [list(prompts)]
    if not all(nested):
        at = nested.index(False)
        raise RequestError(
            f"prompts: entry {at} is {shown(prompts[at])}, wanted texts or lists of token ids "
            "throughout"
        )
    return list(prompts)


def _plain_ids(ids: Any) -> list[Any]:
    """Numpy integers become Python's; everything else is left for the engine's check to name."""
    if isinstance(ids, np.ndarray):
        return ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise RequestError(f"prompt: got {shown(ids)}, wanted a list of token ids")
    return [i.item() if isinstance(i, np.integer) else i for i in ids]


def _as_params(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(f"sampling_params: got {shown(params)}, wanted SamplingParams or a list")
    if len(params) != count:
        raise RequestError(
            f"sampling_params: got {len(params)} for {count} prompts, wanted one for all "
            "or one each"
        )
    return list(params)


def _without_errors(output: RequestOutput) -> RequestOutput:
    for c in output.outputs:
        if c.finish_reason == "error":
            raise JaxMoeError(f"request {output.request_id}: {failure(c)}")
    return output
