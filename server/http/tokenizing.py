"""Prompts to token ids, as far as there is room: what waits for the tokenizer is bounded, and ends with its client.

Runs on the event loop; the engine encodes on threads of its own. Called by `server.http.generation`, before
the engine's own queue sees the request: without a bound, prompts that the engine would then refuse would pile
up in front of the tokenizer.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from starlette.requests import Request

from server.errors import EngineOverloaded
from server.http.caller import caller_of
from server.http.services import Engine

MAX_WAITING_CHARS: Final = 2**24
"""Characters and token ids, because they are what costs. A tenant has half of it: a burst of 4,000 short prompts fits, and
8 bodies of 1 MiB.
"""
_CHARS_OF_A_MESSAGE: Final = 64
"""What a turn costs beside its text: a template runs for each, however short it is."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a chat, each `role` and `content`, to be written in the model's chat template."""

    messages: tuple[Mapping[str, str], ...]
    add_generation_prompt: bool = True

    def __len__(self) -> int:
        """Its characters, near enough."""
        return sum(len(turn["content"]) + _CHARS_OF_A_MESSAGE for turn in self.messages)


Prompt: TypeAlias = str | tuple[int, ...] | Conversation


class TokenizerQueue:
    """The characters and token ids that wait for the tokenizer, by tenant. One per app."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()

    @contextlib.contextmanager
    def room_for(self, prompts: Sequence[Prompt], tenant: str) -> Iterator[None]:
        """Held while `prompts` are encoded, or decoded. Raises `EngineOverloaded`; never if nothing else waits.

        A tenant alone can fill half of the room: what it sends does not shut the others out.
        """
        size = sum(map(len, prompts))
        for waiting, most in (
            (self._waiting.total(), MAX_WAITING_CHARS),
            (self._waiting[tenant], MAX_WAITING_CHARS // 2),
        ):
            if size and waiting and waiting + size > most:
                raise EngineOverloaded("too many prompts wait for the tokenizer; try again later")
        self._waiting[tenant] += size
        try:
            yield
        finally:
            self._waiting[tenant] -= size
            if not self._waiting[tenant]:
                del self._waiting[tenant]


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


def tokenizer_room(
    request: Request, prompts: Sequence[Prompt]
) -> contextlib.AbstractContextManager[None]:
    """The room for `prompts` in the queue of the app that got this request, for whoever sent it. Raises on entry as `room_for`."""
    queue = request.app.state.tokenizer_queue
    assert isinstance(queue, TokenizerQueue)
    return queue.room_for(prompts, caller_of(request).tenant)
