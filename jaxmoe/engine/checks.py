"""What can be said about a request without an engine: ids, lengths, limits.

The front asks here before it queues anything, so that a bad request is answered at once whatever
the engine is busy with; the engine asks again at its own border.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxmoe.common.errors import RequestError
from jaxmoe.engine.async_engine import EngineInfo
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.text.tokenizer import check_ids

# Log probabilities of one answer. Its last message carries all of its completions' at once, up to
# 32 bytes each: half of a frame (channel.py); 190,000 tokens with the 20 likeliest fit.
MAX_LOGPROB_ENTRIES = 1 << 22


def check_prompt(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError for an empty prompt and for ids that are not in the vocabulary."""
    if not len(token_ids):
        raise RequestError("the prompt is empty; wanted at least one token")
    check_ids(token_ids, vocab_size, "prompt token ids")


def check_params(params: SamplingParams, vocab_size: int, *, has_tokenizer: bool) -> None:
    """Raises RequestError for what SamplingParams cannot know to be wrong."""
    check_ids(params.stop_token_ids, vocab_size, "stop_token_ids")
    check_ids([i for i, _ in params.logit_bias], vocab_size, "logit_bias")
    if params.stop and not has_tokenizer:
        raise RequestError("stop: this engine has no tokenizer; use stop_token_ids")


def resolve_max_tokens(
    num_prompt: int, params: SamplingParams, *, max_model_len: int, default: int | None
) -> int:
    """Longest output of a request; RequestError with both numbers where it does not fit.

    default: where the request names none; gives way to a context that has less room, and to what
    an answer may hold of log probabilities.
    """
    room = max_model_len - num_prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {num_prompt} tokens, but the context holds {max_model_len} "
            "(max_model_len) and one is needed for the output; shorten the prompt or, if the "
            "model's limit allows, raise max_model_len"
        )
    entries_left = MAX_LOGPROB_ENTRIES
    if params.prompt_logprobs is not None:
        entries_left -= num_prompt * (params.prompt_logprobs + 1)
    if params.logprobs is not None:
        logprobs_room = entries_left // (params.n * (params.logprobs + 1))
    else:
        logprobs_room = room if entries_left >= 0 else 0
    if (params.max_tokens or 1) > logprobs_room and (params.max_tokens or 1) <= room:
        raise RequestError(_too_many_logprobs(num_prompt, params))
    if params.max_tokens is None:
        max_tokens = min(room, default or room, logprobs_room)
    elif params.max_tokens > room:
        raise RequestError(
            f"prompt ({num_prompt} tokens) + max_tokens ({params.max_tokens}) = "
            f"{num_prompt + params.max_tokens}, but the context holds {max_model_len} "
            f"(max_model_len); lower max_tokens to {room} or, if the model's limit allows, raise "
            "max_model_len"
        )
    else:
        max_tokens = params.max_tokens
    if params.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens: got {params.min_tokens}, but at most {max_tokens} tokens have room"
        )
    return max_tokens


def _too_many_logprobs(num_prompt: int, params: SamplingParams) -> str:
    parts = []
    if params.prompt_logprobs is not None:
        parts.append(f"{num_prompt} prompt tokens x ({params.prompt_logprobs} + 1)")
    if params.logprobs is not None:
        max_tokens = params.max_tokens or 1
        parts.append(f"n ({params.n}) x {max_tokens} tokens x ({params.logprobs} + 1)")
    return (
        f"logprobs: got {' + '.join(parts)} log probabilities, wanted at most "
        f"{MAX_LOGPROB_ENTRIES} in one answer; lower logprobs, prompt_logprobs, n or max_tokens"
    )


def check_request(info: EngineInfo, token_ids: Sequence[int], params: SamplingParams) -> None:
    """All of the above, by what a front knows of its engine."""
    check_prompt(token_ids, info.vocab_size)
    check_params(params, info.vocab_size, has_tokenizer=info.has_tokenizer)
    resolve_max_tokens(
        len(token_ids),
        params,
        max_model_len=info.max_model_len,
        default=info.default_max_tokens,
    )
