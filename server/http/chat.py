"""`POST /v1/chat/completions`: OpenAI's chats, where `model` names a task.

Runs on the event loop. The conversation is written in the chat template that the model came with; a request
can not bring another, and for a model without one it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.http.chat_schemas import ChatRequest, conversation_of
from server.http.generation import Choice, Generation, Start, start_generation
from server.http.json_body import read_object, validated
from server.http.logprobs import chat_logprobs
from server.http.openai_answer import (
    answer_headers,
    answered,
    frame,
    usage,
    usage_event,
    with_usage,
)
from server.http.schemas import StreamOptions
from server.http.services import Engine, request_id_of, services_of
from server.http.sse import Events, event
from server.http.targets import Defaults, find_target, session_key
from server.http.unsupported import NOT_IN_CHAT, refuse_unsupported
from server.types import RequestOutput, TokenLogprob


async def create_chat_completion(request: Request) -> Response:
    """The next turn of a conversation, at once or as a stream."""
    services = services_of(request)
    value = await read_object(request, services.max_body_bytes)
    refuse_unsupported(value, NOT_IN_CHAT)
    if value.get("max_completion_tokens") is not None:  # the newer name of the same thing
        value["max_tokens"] = value["max_completion_tokens"]
    body = validated(ChatRequest, value)
    conversation = conversation_of(body.messages)
    num_logprobs = body.num_logprobs()
    target = find_target(services, body.model, "model", session_key(request, body.user))
    request_id = request_id_of(request)
    start = Start(
        request_id,
        "chat",
        target,
        body,
        [conversation],
        defaults=Defaults(max_tokens=None),
        stream=bool(body.stream),
        logprobs=num_logprobs,
    )
    generation = await start_generation(request, start)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    answer = ChatAnswer(
        frame(kind, f"chatcmpl-{request_id}", body.model, services, target),
        bool(body.return_token_ids),
        body.stream_options or StreamOptions(),
        None if num_logprobs is None else services.engine,
    )
    headers = answer_headers(services, target)
    return await answered(request, generation, answer, headers, stream=bool(body.stream))


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """The words of OpenAI's answer. `frame`: the fields that every body and every chunk repeats.

    `engine`: whose tokens are written with their log-probabilities; None if they were not asked for.
    """

    frame: dict[str, Any]
    token_ids: bool
    options: StreamOptions
    engine: Engine | None
    _begun: set[int] = field(default_factory=set)  # choices whose role was told

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            self._choice(
                choice, choice.token_ids, choice.logprobs, {"message": _message(choice.text)}
            )
            for choice in generation.choices
        ]
        return {**self.frame, "choices": choices, "usage": usage(generation)}

    async def events(self, generation: Generation) -> Events:
        """A chunk per increment, before a choice's first one its role; then the usage if it was asked for."""
        async for choice, output in generation.outputs():
            chunks = [self._chunk(choice, output)]
            if choice.index not in self._begun:
                self._begun.add(choice.index)
                # Not a moment before the first token: load generators take the first chunk for it.
                chunks.insert(0, self._opening(choice))
            yield b"".join(event(with_usage(c, generation, self.options)) for c in chunks)
        if self.options.include_usage:
            yield usage_event(self.frame, generation)

    def _opening(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        opening = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self.frame, "choices": [opening]}

    def _chunk(self, choice: Choice, output: RequestOutput) -> dict[str, Any]:
        # Without a role: some clients take a null for a change of it.
        delta = {"delta": {"content": output.text}}
        choices = [self._choice(choice, output.token_ids, output.logprobs, delta)]
        return {**self.frame, "choices": choices}

    def _choice(
        self,
        choice: Choice,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        content: dict[str, Any],
    ) -> dict[str, Any]:
        ids = {"token_ids": list(token_ids)} if self.token_ids else {}
        return {
            "index": choice.index,
            **content,
            "logprobs": None if self.engine is None else chat_logprobs(self.engine, logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **ids,
        }


def _message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None}
