"""Prompts to token ids, as far as there is room: what waits for the tokenizer is bounded, and ends with its client.

Runs on the event loop; the engine encodes on threads of its own. Called by `server.http.generation`, before
the engine's own queue sees the request: without a bound, prompts that the engine would then refuse would pile
up in front of the tokenizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from starlette.requests import Request

from server.errors import EngineOverloaded
from server.http.services import Engine

MAX_WAITING_CHARS: Final = 2**23
"""Characters, because they are what costs: a burst of 4,000 short prompts fits, and 8 bodies of 1 MiB."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a chat, each `role` and `content`, to be written in the model's chat template."""

    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = True

    def __len__(self) -> int:
        """Its characters, near enough."""
        return sum(len(message["content"]) for message in self.messages)


Prompt: TypeAlias = str | tuple[int, ...] | Conversation


class TokenizerQueue:
    """The characters that wait for the tokenizer. One per app."""

    def __init__(self) -> None:
        self._num_chars = 0

    @contextlib.contextmanager
    def room_for(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Held while `prompts` are encoded. Raises `EngineOverloaded`; never if nothing else waits."""
        size = sum(len(prompt) for prompt in prompts if not isinstance(prompt, tuple))
        if size and self._num_chars and self._num_chars + size > MAX_WAITING_CHARS:
            raise EngineOverloaded("too many prompts wait for the tokenizer; try again later")
        self._num_chars += size
        try:
            yield
        finally:
            self._num_chars -= size


async def tokenized(
    engine: Engine, prompts: Sequence[Prompt], *, special_tokens: bool = True
) -> list[tuple[int, ...]]:
    """Every prompt as token ids, one after the other. Raises `InvalidParameter` without a chat template."""
    return [await _tokenized(engine, prompt, special_tokens) for prompt in prompts]


async def _tokenized(engine: Engine, prompt: Prompt, special_tokens: bool) -> tuple[int, ...]:
    match prompt:
        case str():
            return await engine.tokenize(prompt, special_tokens=special_tokens)
        case Conversation(messages, add_generation_prompt):
            return await engine.tokenize_chat(messages, add_generation_prompt)
        case tuple():
            return prompt


def tokenizer_queue_of(request: Request) -> TokenizerQueue:
    """The queue of the app that got this request."""
    queue = request.app.state.tokenizer_queue
    assert isinstance(queue, TokenizerQueue)
    return queue
