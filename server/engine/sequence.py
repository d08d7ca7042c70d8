"""The decoding state of one choice of one request, and its legal transitions.

Owned by the engine thread (the scheduler changes it; the runner reads it). Never crosses threads. All of
it can be rebuilt from the request and `output_token_ids`: that is what preemption does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from server.kvcache.resident_prefixes import PrefixLease
from server.types import GenerationRequest, PrefixTier


class SequenceStatus(StrEnum):
    """Where a sequence stands; see `_TRANSITIONS`."""

    WAITING = "waiting"
    WAITING_FOR_PREFIX = "waiting_for_prefix"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


_S = SequenceStatus
_TRANSITIONS: Final = {
    _S.WAITING: {_S.WAITING_FOR_PREFIX, _S.RUNNING, _S.FINISHED},
    _S.WAITING_FOR_PREFIX: {_S.RUNNING, _S.FINISHED},
    _S.RUNNING: {_S.PREEMPTED, _S.FINISHED},
    _S.PREEMPTED: {_S.WAITING_FOR_PREFIX, _S.RUNNING, _S.FINISHED},
    _S.FINISHED: set[SequenceStatus](),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice (`index` of n) of a request.

    `num_computed_tokens`: own tokens (prompt and output) whose K/V is in `block_table`; tokens of the
    prefix are counted nowhere here. `block_table` and `lease` are held exactly while RUNNING.
    `seed` is fixed when the request is submitted, so that a recompute samples the same tokens.
    """

    request: GenerationRequest
    index: int
    seed: int
    arrival: float
    status: SequenceStatus = SequenceStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    lease: PrefixLease | None = None
    prefix_tier: PrefixTier | None = None
    first_scheduled: float | None = None
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Own tokens known so far: prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_virtual_tokens(self) -> int:
        return self.request.prefix.num_virtual_tokens if self.request.prefix else 0

    @property
    def digest(self) -> str | None:
        return self.request.prefix.digest if self.request.prefix else None

    def token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Own tokens start..stop-1."""
        prompt = self.request.prompt_token_ids
        if start >= len(prompt):
            return tuple(self.output_token_ids[start - len(prompt) : stop - len(prompt)])
        tail = self.output_token_ids[: max(0, stop - len(prompt))]
        return (*prompt[start:stop], *tail)

    def become(self, status: SequenceStatus) -> None:
        """Changes the status along a legal edge."""
        assert status in _TRANSITIONS[self.status], f"{self.status} -> {status}"
        self.status = status
