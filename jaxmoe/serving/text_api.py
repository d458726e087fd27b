"""/tokenize and /detokenize: the tokens of a text or a conversation, and the text of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmoe.serving.chat_prompt import ChatRequest, render
from jaxmoe.serving.errors import ApiError, bad_field
from jaxmoe.serving.fields import Body
from jaxmoe.serving.replies import JsonReply, Reply
from jaxmoe.serving.state import Call, ServerState
from jaxmoe.text.tokenizer import Tokenizer, check_ids


async def tokenize(state: ServerState, call: Call) -> Reply:
    body = call.body
    state.check_model(body.get("model"))
    if body.given("prompt") == body.given("messages"):
        raise ApiError(400, "wanted either prompt or messages", param="prompt")
    limit = state.info().max_model_len
    return JsonReply(await state.off_loop(_tokenize, state, body, limit))


def _tokenize(state: ServerState, body: Body, max_model_len: int) -> dict[str, Any]:
    """Runs in a thread."""
    ids = _ids(state, body, max_model_len)
    out: dict[str, Any] = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids}
    if body["return_token_strs"]:
        token_bytes = state.tokenizer.token_bytes
        out["token_strs"] = [token_bytes(i).decode("utf-8", "replace") for i in ids]
    return out


def _ids(state: ServerState, body: Body, max_model_len: int) -> list[int]:
    if body.given("prompt"):
        special = body["add_special_tokens"]
        return state.encode(body["prompt"], "prompt", max_model_len, special=special)
    request = ChatRequest(
        messages=body["messages"],
        sampling={},
        template_kwargs=body.get("chat_template_kwargs", {}),
        add_generation_prompt=body["add_generation_prompt"],
        continue_final_message=body["continue_final_message"],
    )
    text, _ = render(state, request)
    return state.encode(text, "messages", max_model_len, special=False)


async def detokenize(state: ServerState, call: Call) -> Reply:
    body = call.body
    state.check_model(body.get("model"))
    if not isinstance(body["tokens"], tuple):
        raise bad_field("tokens", "wanted a list of token ids")
    text = await state.off_loop(_detokenize, state.tokenizer, body["tokens"])
    return JsonReply({"prompt": text, "text": text})


def _detokenize(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Runs in a thread."""
    check_ids(ids, tokenizer.vocab_size, "tokens")
    return tokenizer.decode(ids, skip_special_tokens=False)
