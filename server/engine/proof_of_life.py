"""A generation of our own: that the server really generates is known only of one that did.

On the event loop; `server.bootstrap` asks for it before the server is ready, `server.process` again while nobody else asks for
anything. A few tokens of the bare model, through queue, scheduler, device and tokenizer as everybody's.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Final, Protocol

from server.errors import GenerationFailed
from server.types import GenerationRequest, RequestOutput, SamplingParams

_PROMPT: Final = (0, 1, 2)
_NUM_TOKENS: Final = 4


class Generates(Protocol):
    """`server.engine.async_engine.AsyncEngine`."""

    @property
    def max_model_len(self) -> int: ...

    def submit(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]: ...


class ProofOfLife:
    """`repeatable`: the same prompt must give the same tokens as the first time; so it is where bits do not depend on luck."""

    def __init__(self, engine: Generates, *, repeatable: bool) -> None:
        self._engine = engine
        self._repeatable = repeatable
        self._first: tuple[int, ...] | None = None
        self._numbers = itertools.count()

    async def prove(self) -> None:
        """Generates. Raises `GenerationFailed` if nothing or something else came out, and what `submit` raises."""
        token_ids: list[int] = []
        last: RequestOutput | None = None
        async for last in self._engine.submit(self._request()):
            token_ids += last.token_ids
        if last is None or last.error is not None:
            raise GenerationFailed(f"the model does not generate: {last and last.error}")
        if self._first is None:
            self._first = tuple(token_ids)
        elif self._repeatable and tuple(token_ids) != self._first:
            raise GenerationFailed("the model no longer generates what it did at start")

    def _request(self) -> GenerationRequest:
        prompt = _PROMPT[: max(1, self._engine.max_model_len - _NUM_TOKENS)]
        room = max(1, self._engine.max_model_len - len(prompt))
        name = f"proof-of-life-{next(self._numbers)}"
        return GenerationRequest(
            request_id=name,
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=min(_NUM_TOKENS, room), temperature=0.0, ignore_eos=True
            ),
            endpoint="",
            cache_salt=name,  # it is to be computed, each time
        )
