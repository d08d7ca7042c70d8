"""What the scheduler is told and what it answers: the inbox messages and the step plan.

All frozen, all free of torch. The event loop and the prefetch workers post `Message`s; the engine thread
hands them to `Scheduler.schedule`, has the `SchedulerOutput` performed and returns `RowOutcome`s to `commit`.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Final, Protocol

from server.engine.sequence import Sequence
from server.types import (
    DeviceReport,
    FinishReason,
    GenerationRequest,
    PinState,
    PrefixRef,
    PrefixTier,
    TokenLogprob,
)

MAX_TOLD_TOKENS: Final = 64
"""Tokens of prompts whose log-probabilities one step may compute: each takes a row of logits, as wide as the vocabulary."""


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Serve this request. `seed` feeds the sampler; `arrival`: monotonic seconds when it was submitted."""

    request: GenerationRequest
    seed: int
    arrival: float


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Stop a request, or one of its choices. Unknown ids are fine: it may have finished meanwhile."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class PrefixReady:
    """The prefix's tensors are in host memory; `tier` says where they came from."""

    digest: str
    tier: PrefixTier


@dataclass(frozen=True, slots=True)
class PrefixFailed:
    """The prefix could not be loaded; `reason` goes to the requests that waited for it."""

    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class WarmPrefix:
    """Make a prefix resident before a request asks for it."""

    ref: PrefixRef


@dataclass(frozen=True, slots=True)
class EvictPrefix:
    """Free a prefix's blocks as soon as no running sequence reads them, also if it is pinned."""

    digest: str


@dataclass(frozen=True, slots=True)
class PinTask:
    """Make a prefix resident and keep it so, for `ttl_seconds` or for ever; answered by `PinState`."""

    ticket: int
    ref: PrefixRef
    ttl_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class FollowPin:
    """`ref` is its task's live version now: a pin of the task moves to it; answered by `PinState` or None."""

    ticket: int
    ref: PrefixRef


@dataclass(frozen=True, slots=True)
class UnpinTask:
    """Let the LRU decide about a task again. One that is not pinned is fine."""

    task: str


@dataclass(frozen=True, slots=True)
class ReportDevice:
    """Say what is resident; answered by `DeviceReport`."""

    ticket: int


Message = (
    AddRequest
    | AbortRequest
    | PrefixReady
    | PrefixFailed
    | WarmPrefix
    | EvictPrefix
    | PinTask
    | FollowPin
    | UnpinTask
    | ReportDevice
)


@dataclass(frozen=True, slots=True)
class Answer:
    """To the message with this ticket."""

    ticket: int
    value: PinState | DeviceReport | None


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One sequence's share of a step: run own tokens `start`..`start + len(token_ids)`.

    The runner reads `sequence` for its sampling state only. `sample`: the last of these tokens is the last
    there is, so its logits give the next; it may be `PENDING`. Tables are copies: they stay what they were when planned.
    `told_token_ids`: tokens of the prompt whose log-probabilities are asked for; the first of them follows own token
    `told_from`, and the logits of that and of the next ones give them.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    start: int
    prefix_block_ids: tuple[int, ...]
    num_virtual_tokens: int
    first_position: int
    block_ids: tuple[int, ...]
    sample: bool
    told_from: int = 0
    told_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """Write the staged tensors of `ref` into these blocks before the step's forward pass."""

    ref: PrefixRef
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The plan of one step: wipe, load, run. `wipe_block_ids` were a failed row's when it ended."""

    prefix_requests: tuple[PrefixRef, ...]
    prefix_loads: tuple[PrefixLoad, ...]
    rows: tuple[ScheduledRow, ...]
    num_preemptions: int
    answers: tuple[Answer, ...] = ()
    wipe_block_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What came of one row: the sampled token, nothing (mid-prefill), or why the row failed; and the log-probabilities of
    that token, and of the row's `told_token_ids`.
    """

    token_id: int | None = None
    error: str | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class LaunchedStep(Protocol):
    """A plan that the device is performing."""

    def outcomes(self) -> Sequence_[RowOutcome]:
        """One per row of the plan. Waits for the device; raises what went wrong there."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One step's gain of one sequence, on its way to the event loop."""

    request_id: str
    index: int
    token_id: int | None
    finish_reason: FinishReason | None
    stop_token_id: int | None
    error: str | None
    prefix_tier: PrefixTier
    queue_seconds: float | None
    num_cached_tokens: int = 0
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
