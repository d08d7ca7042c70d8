"""The decoding state of one choice of one request, and its legal transitions.

Owned by the engine thread (the scheduler changes it; the runner reads it). Never crosses threads. All of
it can be rebuilt from the request and `output_token_ids`: that is what preemption does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from server.kvcache.prompt_cache import BlockChain
from server.kvcache.resident_prefixes import PrefixLease
from server.types import FinishReason, GenerationRequest, PrefixTier, TokenLogprob


class SequenceStatus(StrEnum):
    """Where a sequence stands; see `_TRANSITIONS`."""

    WAITING = "waiting"
    WAITING_FOR_PREFIX = "waiting_for_prefix"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


PENDING: Final = -1
"""An output token that a step under way samples: the device will know it, and the next step may build on it there."""

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

    `output_token_ids`: those known, and behind them `PENDING` for one that is not yet (for two between the launch of a step
    and the commit of the one before). `num_computed_tokens`: own tokens (prompt and output) whose K/V is in `block_table`, or
    will be when the steps under way have ended; tokens of the prefix are counted nowhere here.
    `block_table` and `lease` are held exactly while RUNNING; the table begins
    with the blocks that `chain` leases from the prompt cache. `num_cached_tokens`: of the prompt, found there.
    `prompt_logprobs`: of the prompt's tokens from the second on, as far as they are known, if the request asks for them.
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
    chain: BlockChain = field(init=False)
    num_cached_tokens: int = 0
    lease: PrefixLease | None = None
    prefix_tier: PrefixTier | None = None
    first_scheduled: float | None = None
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        ref = self.request.prefix
        self.chain = BlockChain.begin(
            self.request.cache_salt, self.digest, ref.first_position if ref else 0
        )

    @property
    def num_tokens(self) -> int:
        """Own tokens so far: prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_pending(self) -> bool:
        """Whether its last token is still to come from the device."""
        return self.output_token_ids[-1:] == [PENDING]

    @property
    def is_full(self) -> bool:
        """Whether it has all the tokens that it may have, known or not."""
        return len(self.output_token_ids) >= self.request.sampling.max_tokens

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

    @property
    def num_told_tokens(self) -> int:
        """Own tokens, from the first on, whose logits are wanted for nothing but their own K/V: no more of them may come
        out of the prompt cache, which has no logits.
        """
        last = len(self.request.prompt_token_ids) - 1
        if self.request.sampling.prompt_logprobs is None or len(self.prompt_logprobs) == last:
            return self.num_tokens
        return len(self.prompt_logprobs)

    @property
    def num_to_tell(self) -> int:
        """Tokens of the prompt whose log-probabilities are still to be computed."""
        return self.num_tokens - self.num_told_tokens

    def take_prompt_logprobs(self, start: int, entries: tuple[TokenLogprob, ...]) -> None:
        """Of the tokens that follow own token `start` and the next ones; those that are known, after a preemption, stay."""
        known = len(self.prompt_logprobs)
        if entries:
            assert start <= known, "there is no gap"
            self.prompt_logprobs += entries[known - start :]

    def settle(self, num_tokens: int, token_id: int) -> int:
        """The token behind the first `num_tokens` is known now. Returns how many output tokens there are with it."""
        index = num_tokens - len(self.request.prompt_token_ids)
        assert self.output_token_ids[index] == PENDING, "a token is sampled once"
        self.output_token_ids[index] = token_id
        return index + 1

    def finish_reason(self, count: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the sequence ends with the last of its first `count` output tokens; None if it goes on."""
        sampling, last = self.request.sampling, self.output_token_ids[count - 1]
        is_eos = last in eos_token_ids and not sampling.ignore_eos
        if (is_eos or last in sampling.stop_token_ids) and count > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= sampling.max_tokens else None

    def become(self, status: SequenceStatus) -> None:
        """Changes the status along a legal edge."""
        assert status in _TRANSITIONS[self.status], f"{self.status} -> {status}"
        self.status = status
