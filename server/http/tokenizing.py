"""Prompts to token ids, as far as there is room: what waits for the tokenizer is bounded, and ends with its client.

Runs on the event loop; the engine encodes on threads of its own. Called by `server.http.generation`, before
the engine's own queue sees the request: without a bound, prompts that the engine would then refuse would pile
up in front of the tokenizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

from starlette.requests import Request

from server.errors import EngineOverloaded
from server.http.services import Engine

MAX_WAITING_CHARS: Final = 2**23
"""Characters, because they are what costs: a burst of 4,000 short prompts fits, and 8 bodies of 1 MiB."""


class TokenizerQueue:
    """The characters that wait for the tokenizer. One per app."""

    def __init__(self) -> None:
        self._num_chars = 0

    @contextlib.contextmanager
    def room_for(self, prompts: Sequence[str | tuple[int, ...]]) -> Iterator[None]:
        """Held while `prompts` are encoded. Raises `EngineOverloaded`; never if nothing else waits."""
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        if size and self._num_chars and self._num_chars + size > MAX_WAITING_CHARS:
            raise EngineOverloaded("too many prompts wait for the tokenizer; try again later")
        self._num_chars += size
        try:
            yield
        finally:
            self._num_chars -= size


async def tokenized(
    engine: Engine, prompts: Sequence[str | tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Every prompt as token ids, one after the other."""
    return [
        await engine.tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
    ]


def tokenizer_queue_of(request: Request) -> TokenizerQueue:
    """The queue of the app that got this request."""
    queue = request.app.state.tokenizer_queue
    assert isinstance(queue, TokenizerQueue)
    return queue
