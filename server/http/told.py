"""How many log-probabilities one answer may hold, and where so many are written.

Pure but for the thread. Called by `server.http.generation` before a request is submitted, and by those who write whole answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool

from server.errors import InvalidParameter
from server.types import SamplingParams

MAX_TOLD: Final = 2**17
"""Values in one answer: 64 prompts of 1,024 tokens, each with one alternative. All of them are Python objects at once."""
_MAX_WRITTEN_HERE: Final = 2**10
"""Above this the event loop leaves the writing to a thread."""

Written = TypeVar("Written")


class Telling(Protocol):
    """`Generation`, as far as its log-probabilities go."""

    @property
    def num_told(self) -> int: ...


def within_bound(
    params: SamplingParams,
    prompts: Sequence[tuple[int, ...]],
    *,
    keeps_output: bool,
    is_default: bool,
) -> SamplingParams:
    """`params`, of which an answer holds at most `MAX_TOLD` values. Raises `InvalidParameter`.

    `keeps_output`: those of generated tokens stay until the answer is written; a stream's go as they come. `is_default`: nobody
    asked for so many tokens, `max_tokens` may be cut to what fits.
    """
    of_prompts = 0
    if params.prompt_logprobs is not None:
        of_prompts = sum(map(len, prompts)) * params.n * (1 + params.prompt_logprobs)
    of_a_token = 0
    if params.logprobs is not None and keeps_output:
        of_a_token = len(prompts) * params.n * (1 + params.logprobs)
    fitting = (MAX_TOLD - of_prompts) // of_a_token if of_a_token else params.max_tokens
    if is_default and max(params.min_tokens, 1) <= fitting < params.max_tokens:
        params = replace(params, max_tokens=fitting)
    count = of_prompts + of_a_token * params.max_tokens
    if count > MAX_TOLD:
        raise InvalidParameter(
            f"logprobs: up to {count} values, at most {MAX_TOLD} in one answer: send fewer prompts, or ask for fewer "
            "tokens or alternatives",
            param="logprobs",
        )
    return params


async def written(generation: Telling, write: Callable[[], Written]) -> Written:
    """What `write` makes of a generation: in a thread where it is much, so that others' streams do not wait."""
    return write() if generation.num_told <= _MAX_WRITTEN_HERE else await run_in_threadpool(write)
