"""Answers a batch's lines with the server's own handlers, on an engine in a thread of this process.

A body is checked by the server's table of fields, prepared by its templates and grammars, and
answered in its shapes, so that a line gets the answer that the server would give. What differs:
sampling options of the command line are the defaults of bodies that say nothing, the name of the
model does not matter, nothing is streamed, and nobody else waits, so that there are no bounds of
time and queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from jaxmoe.cli.batch_lines import Line, LineError, http_response, record_head
from jaxmoe.cli.batch_plain import PlainRequest, plain_record, plain_request
from jaxmoe.common.errors import EngineDeadError
from jaxmoe.common.fields import rules
from jaxmoe.engine.admission import QueueBounds
from jaxmoe.engine.ready import Ready
from jaxmoe.engine.thread_engine import ThreadEngine
from jaxmoe.llm import LLM
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving import chat, completions
from jaxmoe.serving.endpoints import Handler
from jaxmoe.serving.errors import as_api_error, bad_field, internal_error
from jaxmoe.serving.fields import Body, Endpoint
from jaxmoe.serving.generation import Generation
from jaxmoe.serving.replies import JsonReply
from jaxmoe.serving.server_config import ServerConfig
from jaxmoe.serving.state import Call, ServerState, Texts
from jaxmoe.text.output_parser import OutputFormats

_log = logging.getLogger(__name__)
_HANDLERS: dict[Endpoint, Handler] = {"chat": chat.handle, "completions": completions.handle}
# Tokens of several steps handed over at once would blur where thoughts end, and so their count.
_HOLD_S = 0.0
_NO_BOUND = QueueBounds(max_requests=2**31, max_tokens=2**62)  # lines are read as they are needed
# Refusals that are no matter of the line: the engine is dead, ending, or full.
_NOT_THE_LINES = (429, 503)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A line whose body was checked. sequences: how many are decoded for it."""

    line: Line
    request_id: str
    request: Body | PlainRequest
    sequences: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """A line's record, and the tokens it cost."""

    record: dict[str, Any]
    prompt_tokens: int
    output_tokens: int


class Answerer:
    """base: sampling parameters that lines may override."""

    def __init__(self, state: ServerState, llm: LLM, base: SamplingParams) -> None:
        self._state = state
        self._llm = llm
        self._base = base

    def check(self, line: Line) -> Asked:
        """Raises LineError."""
        request_id = f"req_{uuid.uuid4().hex}"
        try:
            if line.endpoint is None:
                plain = plain_request(line.body, self._base)
                return Asked(line, request_id, plain, len(plain.prompts) * plain.params.n)
            body = self._state.checker.check(line.endpoint, self._filled(line))
            if body["stream"]:
                raise bad_field("stream", "a batch's answers are whole; leave it out")
        except Exception as e:
            raise self._error(e, line, request_id) from e
        prompts = len(body["prompt"]) if line.endpoint == "completions" else 1
        return Asked(line, request_id, body, prompts * body.get("n", self._base.n))

    async def answer(self, asked: Asked) -> Answer:
        """Raises LineError, and EngineDeadError where no line can be answered any more."""
        try:
            if isinstance(asked.request, PlainRequest):
                return await self._plain(asked, asked.request)
            return await self._openai(asked, asked.request)
        except Exception as e:
            raise self._error(e, asked.line, asked.request_id) from e

    async def _openai(self, asked: Asked, body: Body) -> Answer:
        call = Call(asked.request_id, None, body, 0.0)
        reply = await _HANDLERS[body.endpoint](self._state, call)
        assert isinstance(reply, JsonReply)
        line, usage = asked.line, reply.value["usage"]
        record = {
            **record_head(line.number, line.custom_id),
            "response": http_response(200, asked.request_id, reply.value),
            "error": None,
        }
        return Answer(record, usage["prompt_tokens"], usage["completion_tokens"])

    async def _plain(self, asked: Asked, request: PlainRequest) -> Answer:
        jobs = await self._state.off_loop(request.jobs, self._llm, asked.request_id)
        generation = Generation(self._state.engine, self._state.metrics, jobs)
        await generation.finish()
        outputs = [o for o in generation.outputs if o is not None]
        usage = generation.usage
        record = plain_record(asked.line, outputs)
        return Answer(record, usage.prompt_tokens, usage.completion_tokens)

    def _filled(self, line: Line) -> Any:
        """The body, with the command line's max_tokens before the table's own default. What else
        the command line says are the defaults of the engine's parameters.
        """
        most = self._base.max_tokens
        if line.endpoint != "completions" or most is None:
            return line.body
        given = {k: v for k, v in line.body.items() if v is not None}  # null: not given
        return {"max_tokens": most, **given}

    def _error(self, error: Exception, line: Line, request_id: str) -> Exception:
        """What is raised for an error: the line's own, or the run's end."""
        api = as_api_error(error)
        if api is None:
            _log.exception("request %s (line %d): an error inside", request_id, line.number)
            api = internal_error(request_id)
        if api.status in _NOT_THE_LINES:
            return EngineDeadError(f"{api.message}; run the same command again to go on")
        return LineError.of(api, line, request_id)


@contextlib.asynccontextmanager
async def answering(
    llm: LLM, base: SamplingParams, model: str, formats: OutputFormats
) -> AsyncGenerator[Answerer]:
    """Drives the model's engine in a thread until the end; the engine itself is left alone.

    model: its name in the answers. formats: how it writes thoughts and calls.
    """
    engine = llm.engine
    info = dataclasses.replace(engine.info(model), default_params=base)
    driven = ThreadEngine(lambda _: Ready(engine, info), _NO_BOUND, hold_s=_HOLD_S)
    most = int(rules(ServerConfig)["max_completions"].high or 0)  # a line keeps nobody waiting
    config = ServerConfig(served_model_name="*", max_completions=most)
    texts = Texts(llm.tokenizer, llm.chat_template, formats)
    state = ServerState(driven, texts, config, model=model, text_timeout_s=None)
    try:
        await driven.wait_ready()
        yield Answerer(state, llm, base)
    finally:
        await driven.close()
        state.close()
