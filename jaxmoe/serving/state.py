"""What the handlers share: the engine, the texts' side of the model, limits, metrics.

Created once and passed down. Work on texts (templates, tokenizing) runs in threads of its own, for
a megabyte of text takes a second, in which nobody else would be answered.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxmoe.common.errors import RequestError
from jaxmoe.common.fields import shown
from jaxmoe.engine.async_engine import AsyncEngine, EngineInfo
from jaxmoe.serving.admission import Admission
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import Body, Checker
from jaxmoe.serving.metrics import Metrics
from jaxmoe.serving.server_config import ServerConfig, split_names
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.text.output_parser import OutputFormats
from jaxmoe.text.tokenizer import Tokenizer

_T = TypeVar("_T")
# Two: one long text must not hold up the short ones.
_TEXT_THREADS = 2
_TEXT_TIMEOUT_S = 60.0  # a megabyte of text takes a second; templates have limits of their own


@dataclasses.dataclass(frozen=True)
class Texts:
    """The model's side of texts. formats: how it writes thoughts and tool calls."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    formats: OutputFormats = OutputFormats()


@dataclasses.dataclass(frozen=True)
class Call:
    """One request to a handler. key: the name of its API key, if one is asked for. received_s:
    monotonic.
    """

    request_id: str
    key: str | None
    body: Body
    received_s: float


class ServerState:
    """See the module.

    max_requests: in work at once, over all keys. More than the engine can run and queue need not
    be tokenized to be refused. text_timeout_s: of work on one text, waiting for a thread included.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        texts: Texts,
        config: ServerConfig,
        *,
        model: str,
        max_requests: int = 1024,
        clock: Callable[[], float] = time.time,
        text_timeout_s: float | None = _TEXT_TIMEOUT_S,
    ) -> None:
        self.engine = engine
        self.texts = texts
        self.config = config
        names = split_names(config.served_model_name)
        shown_names = tuple(n for n in names if n != "*") or (model,)
        self.model_names = shown_names
        self._any_model = "*" in names
        self.created = int(clock())
        self.draining = False
        self.has_keys = False
        self.checker = Checker()
        self.metrics = Metrics(engine, shown_names[0])
        self.admission = Admission(max_requests, config.max_requests_per_key)
        self._threads = concurrent.futures.ThreadPoolExecutor(_TEXT_THREADS, "texts")
        self._longest_token_chars: int | None = None
        self._text_timeout_s = text_timeout_s

    @property
    def model(self) -> str:
        """The name shown in answers."""
        return self.model_names[0]

    def warm_up(self) -> None:
        """Starts what the first request would wait for; in the background."""
        if self.texts.chat_template is not None:
            self._threads.submit(self.texts.chat_template.start)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.texts.chat_template is not None:
            self.texts.chat_template.close()

    def info(self) -> EngineInfo:
        """The engine's; ApiError 503 with what is being done while it takes no requests."""
        status = self.engine.status()
        if self.draining or status.state == "draining":
            raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=10.0)
        if status.state == "ready":
            return self.engine.info
        if status.state == "dead":
            raise ApiError(
                503, f"the engine is dead: {status.error}", code="engine_down", retry_after_s=30.0
            )
        raise ApiError(
            503,
            f"the model is {status.state}: {status.stage or 'starting'}, {status.percent:.0f} %",
            code="not_ready",
            retry_after_s=5.0,
        )

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not served."""
        if name is not None and not self._any_model and name not in self.model_names:
            raise ApiError(
                404,
                f"model: got {shown(name)}, this server has {', '.join(self.model_names)}; use "
                "that, or give the server another --served_model_name",
                param="model",
                code="model_not_found",
            )

    @property
    def tokenizer(self) -> Tokenizer:
        if self.texts.tokenizer is None:
            raise RequestError("this model has no tokenizer.json; give token ids instead of text")
        return self.texts.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        if self.texts.chat_template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        return self.texts.chat_template

    async def off_loop(self, work: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Runs work on texts in a thread. Leaving early leaves the thread to end by itself."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, functools.partial(work, *args, **kwargs))
        try:
            async with asyncio.timeout(self._text_timeout_s):
                return await future
        except TimeoutError:
            raise ApiError(
                408,
                f"preparing the text took more than {self._text_timeout_s:g} s",
                code="text_timeout",
            ) from None

    def encode(self, text: str, param: str, max_model_len: int, *, special: bool) -> list[int]:
        """Token ids of a text; runs in a thread. What cannot fit is refused by its length, before
        seconds are spent on it.
        """
        tokenizer = self.tokenizer
        if self._longest_token_chars is None:
            ids = range(tokenizer.vocab_size)
            self._longest_token_chars = max((len(tokenizer.token_bytes(i)) for i in ids), default=1)
        most = max_model_len * self._longest_token_chars
        if len(text) > most:
            raise too_long(
                param, f"the text has {len(text)} characters and the context's {max_model_len} "
                f"tokens (max_model_len) hold at most {most}"
            )  # fmt: skip
        return tokenizer.encode(text, add_special_tokens=special)

    def props(self) -> Mapping[str, Any]:
        """What the server is, for programs and the chat page."""
        status = self.engine.status()
        out: dict[str, Any] = {
            "model": self.model,
            "models": list(self.model_names),
            "state": "draining" if self.draining else status.state,
            "has_chat_template": self.texts.chat_template is not None,
            "has_tokenizer": self.texts.tokenizer is not None,
            "reasoning_format": self.texts.formats.reasoning,
            "tool_format": self.texts.formats.tools,
        }
        if status.state in ("ready", "draining"):
            info = self.engine.info
            defaults = info.default_params
            out |= {
                "max_model_len": info.max_model_len,
                "max_num_seqs": info.max_num_seqs,
                "vocab_size": info.vocab_size,
                "kv_cache_tokens": info.num_pages * info.page_size,
                "eos_token_ids": list(info.eos_token_ids),
                "default_generation_settings": {
                    name: getattr(defaults, name)
                    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
                },
                "report": info.report.splitlines(),
            }
        return out


def too_long(param: str, message: str) -> ApiError:
    return ApiError(
        400, f"{param}: {message}; shorten it", param=param, code="context_length_exceeded"
    )
