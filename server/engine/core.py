"""The inner loop: `EngineCore.step` takes the inbox, plans, launches, commits.

Owned by the engine thread, which calls `step` while there is work. Holds the prefixes that wait in host
memory for their blocks; knows no sockets, no text, no event loop.

Steps overlap where the device works by itself (`EngineParts.overlapped`): a step is planned and launched while the one before
runs, whose outcomes are committed after that. The device then never waits for the host, and clients get their tokens as they would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prefix_store.artifact import Prefix, as_it_is
from server.engine.calls import EngineCall
from server.engine.messages import (
    Answer,
    LaunchedStep,
    Message,
    PrefixFailed,
    PrefixReady,
    RowOutcome,
    ScheduledRow,
    SchedulerOutput,
    SequenceOutput,
)
from server.engine.prefetch import PrefixAnswer, PrefixLoaded, PrefixLoadFailed
from server.engine.scheduler import Scheduler
from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import PrefixEvent, PrefixRef, PrefixTier, StepStats

logger = logging.getLogger(__name__)

STEP_FAILED = "the engine failed while it ran this request's step"


class Runner(Protocol):
    """What performs a plan: `ModelRunner`, or a double in tests."""

    def launch(self, plan: SchedulerOutput, staged: Mapping[str, Prefix]) -> LaunchedStep: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave: increments for clients, answers to operators, and its figures."""

    outputs: list[SequenceOutput]
    stats: StepStats
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    plan: SchedulerOutput
    launched: LaunchedStep


@dataclass(frozen=True, slots=True)
class _NotLaunched:
    """In the place of a step whose launch failed; it fails where the others' outcomes are asked for."""

    error: Exception

    def outcomes(self) -> Sequence[RowOutcome]:
        raise self.error


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of; `bootstrap` builds them. `block_bytes`: one block over all layers.

    `stage`: what a `Prefetcher` does to a prefix before the engine thread gets it. `overlapped`: whether a step is launched
    before the outcomes of the one before are known.
    """

    scheduler: Scheduler
    blocks: BlockPool
    prefixes: ResidentPrefixes
    prompt_cache: PromptCache
    runner: Runner
    block_bytes: int
    stage: Callable[[Prefix], Prefix] = as_it_is
    overlapped: bool = False


class EngineCore:
    """Drives scheduler and runner. `request_prefix` starts a load whose answer comes with a later step."""

    def __init__(
        self,
        parts: EngineParts,
        request_prefix: Callable[[PrefixRef], None],
        clock: Callable[[], float],
        *,
        debug: bool = False,
    ) -> None:
        self._parts = parts
        self._scheduler = parts.scheduler
        self._request_prefix = request_prefix
        self._clock = clock
        self._debug = debug
        self._under_way: _StepUnderWay | None = None
        self._staged: dict[str, Prefix] = {}
        self._events: list[PrefixEvent] = []

    def has_work(self) -> bool:
        """Whether a step would do anything without a new message."""
        return self._under_way is not None or self._scheduler.has_work()

    def step(self, inbox: Sequence[Message | PrefixAnswer | EngineCall]) -> StepResult:
        """One step: calls, plan, launch, commit. Never raises for a row's or a plan's failure: those rows end."""
        started = self._clock()
        outputs: list[SequenceOutput] = []
        if self._scheduler.needs_tokens or any(isinstance(item, EngineCall) for item in inbox):
            outputs += self._commit_under_way()
        messages = _perform_calls(inbox)
        plan = self._scheduler.schedule(started, [self._stage(m) for m in messages])
        outputs += self._scheduler.take_ended()
        for ref in plan.prefix_requests:
            self._request_prefix(ref)
        launched = self._launch(plan)
        outputs += self._commit_under_way()
        self._under_way = launched
        if not (self._parts.overlapped and plan.rows):
            outputs += self._commit_under_way()
        self._forget_staged()
        if self._debug:
            self._scheduler.check_invariants()
        return StepResult(outputs, self._stats(plan, self._clock() - started), plan.answers)

    def _stage(self, message: Message | PrefixAnswer) -> Message:
        """Keeps a loaded prefix's tensors here and tells the scheduler only that they came."""
        match message:
            case PrefixLoaded(ref, prefix, tier, seconds):
                self._staged[ref.digest] = prefix
                self._note("load", tier, ref, seconds=seconds)
                return PrefixReady(ref.digest, tier)
            case PrefixLoadFailed(ref, reason, seconds):
                self._note("load_failed", PrefixTier.DISK, ref, seconds=seconds)
                return PrefixFailed(ref.digest, reason)
            case other:
                return other

    def _launch(self, plan: SchedulerOutput) -> _StepUnderWay:
        launched: LaunchedStep
        try:
            launched = self._parts.runner.launch(plan, self._staged)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this plan's rows and no others
            launched = _NotLaunched(error)
        self._scheduler.advance(plan)
        return _StepUnderWay(plan, launched)

    def _commit_under_way(self) -> list[SequenceOutput]:
        """Waits for the step under way, if there is one, and takes in what came of it."""
        step, self._under_way = self._under_way, None
        if step is None:
            return []
        try:
            outcomes = step.launched.outcomes()
        except Exception:
            logger.exception("a step of %d rows failed", len(step.plan.rows))
            return self._scheduler.fail(step.plan, STEP_FAILED)
        return self._scheduler.commit(step.plan, outcomes)

    def _forget_staged(self) -> None:
        """Lets go of tensors that are resident now, or that nobody waits for any more."""
        wanted = self._scheduler.staged
        for digest in [d for d in self._staged if d not in wanted]:
            del self._staged[digest]

    def _note(self, kind: str, tier: PrefixTier, ref: PrefixRef, *, seconds: float = 0.0) -> None:
        self._events.append(PrefixEvent(kind, tier, ref.task, ref.digest, seconds))

    def _stats(self, plan: SchedulerOutput, seconds: float) -> StepStats:
        for entry in self._parts.prefixes.take_evicted():
            self._note("evict", PrefixTier.DEVICE, entry.ref)
        events, self._events = tuple(self._events), []
        prefixes, blocks = self._parts.prefixes, self._parts.blocks
        prompt_cache = self._parts.prompt_cache
        num_asked_tokens, num_hit_tokens = prompt_cache.take_counts()
        decode = sum(_is_decode(row) for row in plan.rows)
        return StepStats(
            duration_seconds=seconds,
            num_prefill_tokens=plan.num_tokens - decode,
            num_decode_tokens=decode,
            num_scheduled_requests=len(plan.rows),
            num_distinct_tasks=len({row.sequence.digest for row in plan.rows}),
            num_preemptions=plan.num_preemptions,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_waiting_for_prefix=self._scheduler.num_waiting_for_prefix,
            num_kv_blocks=blocks.capacity,
            num_kv_blocks_used=blocks.num_used,
            num_prefix_blocks=prefixes.num_blocks,
            num_prompt_cache_blocks=prompt_cache.num_blocks,
            num_idle_prompt_blocks=prompt_cache.num_evictable_blocks,
            num_asked_tokens=num_asked_tokens,
            num_hit_tokens=num_hit_tokens,
            device_prefix_bytes=prefixes.num_blocks * self._parts.block_bytes,
            resident_tasks=prefixes.tasks,
            events=events,
        )


def _is_decode(row: ScheduledRow) -> bool:
    """One token behind the prompt; a prompt's last token is prefill, however much of it was cached."""
    return len(row.token_ids) == 1 and row.start >= len(row.sequence.request.prompt_token_ids)


def _perform_calls(
    inbox: Sequence[Message | PrefixAnswer | EngineCall],
) -> list[Message | PrefixAnswer]:
    """Runs the calls now, while no forward pass is under way; returns what is left for the scheduler."""
    messages: list[Message | PrefixAnswer] = []
    for item in inbox:
        if isinstance(item, EngineCall):
            item.perform()
        else:
            messages.append(item)
    return messages
