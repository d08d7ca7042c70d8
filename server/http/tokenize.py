"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the tokenizer for clients that have none, in vLLM's words.

Runs on the event loop; tokens and texts are made on the engine's encode threads. lm-eval and `vllm bench` count and
align their prompts with these; they name no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Final

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidParameter
from server.http.chat_schemas import MAX_MESSAGES, ChatTurn, conversation_of
from server.http.disconnect import unless_gone
from server.http.json_body import read_object, validated
from server.http.json_text import json_response
from server.http.schemas import Body, TokenIds
from server.http.services import Services, services_of
from server.http.targets import find_target
from server.http.tokenizing import Prompt, tokenized, tokenizer_room

_MODEL: Final = (
    "A task or the base model, whose room for tokens is told; the base model if left out"
)


class TokenizeRequest(Body):
    """`POST /tokenize`: exactly one of `prompt` and `messages`."""

    model: str | None = Field(default=None, description=_MODEL)
    prompt: str | None = None
    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Whether the tokenizer adds its own (BOS) to a text; it does"
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Whether messages end with the beginning of an answer; they do"
    )
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = Field(default=None, description=_MODEL)
    tokens: TokenIds


async def tokenize(request: Request) -> Response:
    """Token ids of a text or a conversation, exactly as a request with it would have."""
    services = services_of(request)
    body = validated(TokenizeRequest, await read_object(request, services.max_body_bytes))
    max_model_len = services.engine.max_model_len - _num_virtual_tokens(services, body.model)
    prompt = _prompt(body)
    with tokenizer_room(request, [prompt]):
        special = body.add_special_tokens is not False
        work = tokenized(services.engine, [prompt], special_tokens=special)
        (tokens,) = await unless_gone(request.receive, work)
    strings = (
        await run_in_threadpool(_strings, services, tokens) if body.return_token_strs else None
    )
    answer = {
        "count": len(tokens),
        "max_model_len": max_model_len,
        "tokens": list(tokens),
        "token_strs": strings,
    }
    return json_response(answer)


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens too."""
    services = services_of(request)
    body = validated(DetokenizeRequest, await read_object(request, services.max_body_bytes))
    _num_virtual_tokens(services, body.model)
    with tokenizer_room(request, [tuple(body.tokens)]):
        work = services.engine.detokenize(body.tokens, "tokens")
        text = await unless_gone(request.receive, work)
    return json_response({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """Special tokens, size and chat template."""
    facts = dataclasses.asdict(services_of(request).engine.tokenizer_facts())
    return json_response({"tokenizer_class": facts.pop("name"), **facts})


def _strings(services: Services, tokens: Sequence[int]) -> list[str]:
    """In a thread: the texts of so many tokens may be new to the tokenizer."""
    return [services.engine.token_text(token).text for token in tokens]


def _num_virtual_tokens(services: Services, model: str | None) -> int:
    """Of a task's prefix. Raises `ModelNotFound`."""
    return find_target(services, model, "model").num_virtual_tokens if model else 0


def _prompt(body: TokenizeRequest) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameter(
            "prompt: expected exactly one of prompt and messages", param="prompt"
        )
    if body.messages is None:
        return body.prompt or ""
    generation = body.add_generation_prompt is not False
    return conversation_of(body.messages, add_generation_prompt=generation)
