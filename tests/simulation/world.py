"""One simulated engine and its clients: random operations by seed, every promise checked after every step.

Real Scheduler, BlockPool, ResidentPrefixes, PromptCache and EngineCore; `HashRunner` instead of a model, a list of due
times instead of threads. The world steps the core as `AsyncEngine` does: when there is a message, or when
the core says that it has work. If neither is so and a request is still open, the engine has stalled.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from prefix_store.artifact import Prefix
from prefix_store.spec import PrefixManifest
from server.engine.calls import EngineCall
from server.engine.core import STEP_FAILED, EngineCore, EngineParts, StepResult
from server.engine.messages import (
    AbortRequest,
    AddRequest,
    EvictPrefix,
    FollowPin,
    Message,
    PinTask,
    ScheduledRow,
    SchedulerOutput,
    SequenceOutput,
    UnpinTask,
    WarmPrefix,
)
from server.engine.prefetch import PrefixAnswer, PrefixLoaded, PrefixLoadFailed
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Sequence, SequenceStatus
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import (
    FinishReason,
    GenerationRequest,
    PinState,
    PrefixRef,
    PrefixTier,
    SamplingParams,
)
from tests.simulation.hash_runner import (
    EOS,
    POISON,
    ROW_ERROR,
    VOCAB,
    WIPED,
    HashRunner,
    PoisoningBlockPool,
    oracle,
    random_ref,
)

LOAD_ERROR: Final = "this load was chosen to fail"
_MAX_DRAIN_STEPS: Final = 20_000
_REASONS: Final = list(FinishReason)

logging.getLogger("server.engine.core").setLevel(logging.CRITICAL)  # injected faults are not news


@dataclass(frozen=True, slots=True)
class Scenario:
    """The shape of one episode: a pool, its limits, its tasks, and how often things happen."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tasks: tuple[PrefixRef, ...]
    max_open: int
    max_own_tokens: int
    max_load_delay: int
    add_rate: float
    abort_rate: float
    warm_rate: float
    pin_rate: float
    pin_budget: float
    evict_rate: float
    call_rate: float
    load_error_rate: float
    row_error_rate: float
    step_error_rate: float
    prompt_cache: bool
    overlapped: bool
    num_salts: int
    tenants: tuple[str, ...]  # as often as they ask
    tenant_weights: dict[str, float]
    beginnings: tuple[tuple[int, ...], ...]

    @staticmethod
    def draw(rng: random.Random) -> Scenario:
        """Small pools and small limits, so that every kind of shortage comes about."""
        block_size = rng.choice([1, 2, 3, 4, 8, 16])
        longest = rng.choice([3, 20, 60, 130]) if block_size > 2 else rng.choice([3, 20])
        max_own_tokens = rng.choice([8, 20, 50])
        tasks = tuple(random_ref(rng, i, longest) for i in range(rng.randint(1, 8)))
        largest = max(-(-ref.num_virtual_tokens // block_size) for ref in tasks)
        need = largest - (-max_own_tokens // block_size)
        max_num_seqs = rng.choice([1, 2, 3, 5, 8])
        faulty = rng.random() < 0.6
        return Scenario(
            block_size=block_size,
            num_blocks=1 + int(need * rng.choice([1.0, 1.2, 1.7, 2.5, 5.0])),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 5, 20, 60]),
            tasks=tasks,
            max_open=rng.choice([2, 5, 12]),
            max_own_tokens=max_own_tokens,
            max_load_delay=rng.choice([0, 2, 12]),
            add_rate=rng.choice([0.1, 0.3, 0.8]),
            abort_rate=rng.choice([0.0, 0.03, 0.2]),
            warm_rate=rng.choice([0.0, 0.02, 0.1]),
            pin_rate=rng.choice([0.0, 0.03, 0.1]),
            pin_budget=rng.choice([1.0, 1.0, 0.5]),
            evict_rate=rng.choice([0.0, 0.02, 0.1]),
            call_rate=rng.choice([0.0, 0.02]),
            load_error_rate=rng.choice([0.0, 0.1, 0.4]) if faulty else 0.0,
            row_error_rate=rng.choice([0.0, 0.01]) if faulty else 0.0,
            step_error_rate=rng.choice([0.0, 0.01, 0.1]) if faulty else 0.0,
            prompt_cache=rng.random() < 0.85,
            overlapped=rng.random() < 0.6,
            num_salts=rng.choice([1, 1, 2]),
            tenants=rng.choice([("",), ("a", "b"), ("a",) * 9 + ("b",), ("a", "a", "a", "b", "c")]),
            tenant_weights=rng.choice([{}, {}, {"b": 3.0}, {"a": 0.5, "c": 2.0}]),
            beginnings=tuple(
                tuple(rng.randrange(VOCAB) for _ in range(max_own_tokens))
                for _ in range(rng.choice([1, 2]))
            ),
        )


class _ObservedScheduler(Scheduler):
    """The real scheduler, keeping for the checks the plan of the last step, what was cached then, and what ended in it."""

    plan: SchedulerOutput
    cached_block_ids: set[int]
    num_reused_tokens: dict[Sequence, int]
    committed: list[SchedulerOutput]
    broken: list[SchedulerOutput]
    failed_block_ids: set[int]

    def schedule(self, now: float, inbox: object = ()) -> SchedulerOutput:
        self.plan = super().schedule(now, inbox)  # type: ignore[arg-type] # as the base class has it
        self.cached_block_ids = self._prompt_cache.block_ids()
        assert self.failed_block_ids <= {*self.plan.wipe_block_ids}, (
            "what a row wrote that failed is left"
        )
        self.failed_block_ids = set()
        size = self._blocks.block_size
        self.num_reused_tokens = {s: len(s.chain.blocks) * size for s in self._running}
        return self.plan

    def commit(self, plan: SchedulerOutput, outcomes: object) -> list[SequenceOutput]:
        self.committed.append(plan)
        return super().commit(plan, outcomes)  # type: ignore[arg-type] # as the base class has it

    def _end_failed(self, seq: Sequence, error: str) -> SequenceOutput:
        self.failed_block_ids |= {*seq.block_table[len(seq.chain.blocks) :]}
        return super()._end_failed(seq, error)

    def fail(self, plan: SchedulerOutput, error: str) -> list[SequenceOutput]:
        self.broken.append(plan)
        return super().fail(plan, error)


@dataclass(slots=True)
class _Open:
    """A choice whose terminal output has not come."""

    request: GenerationRequest
    seed: int
    tokens: list[int] = field(default_factory=list)
    aborted: bool = False


class World:
    """An engine under one scenario. `tick` is a turn of its loop; `drain` lets it come to rest."""

    def __init__(self, seed: int, scenario: Scenario | None = None) -> None:
        self._rng = rng = random.Random(seed)
        self.scenario = s = scenario or Scenario.draw(rng)
        self.blocks = PoisoningBlockPool(s.num_blocks, s.block_size)
        self.prefixes = ResidentPrefixes(self.blocks)
        self.runner = HashRunner(self.blocks, rng, s.row_error_rate, s.step_error_rate)
        self.prompt_cache = PromptCache(self.blocks, enabled=s.prompt_cache)
        self.scheduler = _ObservedScheduler(
            SchedulerLimits(s.max_num_seqs, s.max_num_batched_tokens, EOS, s.pin_budget),
            self.blocks,
            self.prefixes,
            self.prompt_cache,
        )
        self.scheduler.failed_block_ids = set()
        parts = EngineParts(
            scheduler=self.scheduler,
            blocks=self.blocks,
            prefixes=self.prefixes,
            prompt_cache=self.prompt_cache,
            runner=self.runner,
            block_bytes=1,
            overlapped=s.overlapped,
        )
        self.core = EngineCore(parts, self._request_prefix, lambda: float(self.now), debug=True)
        self.now = 0
        self.trace = 0
        self.num_steps = 0
        self._num_idle = 0
        self._step_broke = False
        self._num_broken_steps = 0
        self._pins: dict[str, tuple[PrefixRef, float | None]] = {}
        self.seen: Counter[str] = Counter()
        self._faults = True
        self._next_id = 0
        self._open: dict[tuple[str, int], _Open] = {}
        self._loads: list[tuple[int, PrefixRef]] = []
        self._loaded_before: set[str] = set()
        self._told: list[
            tuple[GenerationRequest, tuple[int, ...]]
        ] = []  # requests and their answers
        self._asked_before: dict[
            str, int
        ] = {}  # tokens of a prompt that stood before an answer in it
        self._inbox: list[Message | PrefixAnswer | EngineCall] = []
        self._put_off: list[Message | PrefixAnswer | EngineCall] = []

    # ---- operations ----------------------------------------------------------------------------

    def tick(self) -> None:
        """Random messages, the loads that are due, and a step if the engine would make one."""
        s, rng = self.scenario, self._rng
        if rng.random() < s.add_rate and len(self._open) < s.max_open:
            self.add(self._random_request())
        if rng.random() < s.abort_rate:
            self._abort_someone()
        if rng.random() < s.warm_rate:
            self._inbox.append(WarmPrefix(rng.choice(s.tasks)))
        if rng.random() < s.pin_rate:
            self._inbox.append(self._random_pin_order(rng.choice(s.tasks)))
        if rng.random() < s.call_rate:
            self._inbox.append(EngineCall(self._called))
        if rng.random() < s.evict_rate:
            self._inbox.append(EvictPrefix(rng.choice(s.tasks).digest))
        self.turn()

    def turn(self) -> None:
        """What the engine thread does in one round of its loop."""
        self.now += 1
        self._deliver_loads()
        if self._inbox or self.core.has_work():
            self._step()
        elif self._open and not self._loads:
            raise AssertionError(f"the engine sleeps on {len(self._open)} open sequences")

    def drain(self) -> None:
        """No more messages and no more faults: everything ends, nothing stays but idle prefixes."""
        self._faults = False
        self.runner.row_error_rate = self.runner.step_error_rate = 0.0
        for _ in range(_MAX_DRAIN_STEPS):
            if not (self._inbox or self._loads or self._open or self.core.has_work()):
                break
            self.turn()
        else:
            raise AssertionError(f"not at rest after {_MAX_DRAIN_STEPS} steps")
        self._check_rest()

    def add(self, request: GenerationRequest) -> None:
        """Submits a request with a seed of its own."""
        seed = self._rng.getrandbits(63)
        self._inbox.append(AddRequest(request, seed, float(self.now)))
        for index in range(request.sampling.n):
            self._open[request.request_id, index] = _Open(request, seed)

    def _random_request(self) -> GenerationRequest:
        s, rng = self.scenario, self._rng
        self._next_id += 1
        own = rng.randint(2, s.max_own_tokens)
        max_tokens = rng.randint(1, own - 1)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
            stop_token_ids=rng.choice([(), (), (rng.randrange(VOCAB),)]),
            ignore_eos=rng.random() < 0.3,
            frequency_penalty=rng.choice([0.0] * 9 + [0.5]),  # tells nothing here but who has it
            n=rng.choice([1, 1, 1, 2, 3]),
        )
        ref = rng.choice([*s.tasks, None])
        beginning = rng.choice(s.beginnings)
        if self._told and rng.random() < 0.3:  # the next turn of a conversation
            before, answer = rng.choice(self._told)
            ref, beginning = before.prefix, before.prompt_token_ids + answer
            self._asked_before[str(self._next_id)] = len(before.prompt_token_ids)
        kept = beginning[: rng.choice([0, rng.randint(0, own), own])]
        prompt = (*kept, *(rng.randrange(VOCAB) for _ in range(own)))[: own - max_tokens]
        salt = str(rng.randrange(s.num_salts))
        tenant = rng.choice(s.tenants)
        return GenerationRequest(
            str(self._next_id),
            prompt,
            sampling,
            ref,
            cache_salt=salt,
            tenant=tenant,
            tenant_weight=s.tenant_weights.get(tenant, 1.0),
        )

    def _random_pin_order(self, ref: PrefixRef) -> Message:
        ttl = self._rng.choice([None, 1, 5, 40])
        pin = PinTask(0, ref, ttl)
        orders: list[Message] = [pin, pin, FollowPin(0, ref), UnpinTask(ref.task)]
        return self._rng.choice(orders)

    def _abort_someone(self) -> None:
        if not self._open:
            self._inbox.append(AbortRequest("0"))  # unknown ids are fine
            return
        request_id, index = self._rng.choice(list(self._open))
        whole = self._rng.random() < 0.5
        self._inbox.append(AbortRequest(request_id, None if whole else index))
        for key, choice in self._open.items():
            if key == (request_id, index) or (whole and key[0] == request_id):
                choice.aborted = True
        for seq in self.scheduler._order:
            if (seq.request.request_id, seq.index) == (request_id, index):
                self.seen[f"abort while {seq.status}"] += 1

    def _called(self) -> None:
        """What somebody has run on the engine thread."""
        assert self.core._under_way is None, "a call beside a step"
        self.seen["call"] += 1

    def _request_prefix(self, ref: PrefixRef) -> None:
        assert ref.digest not in {r.digest for _, r in self._loads}, "single flight"
        if ref.digest in self._loaded_before:
            self.seen["reload"] += 1
        self._loaded_before.add(ref.digest)
        self._loads.append((self.now + self._rng.randint(0, self.scenario.max_load_delay), ref))

    def _deliver_loads(self) -> None:
        due = [load for load in self._loads if load[0] < self.now]
        for load in due:
            self._loads.remove(load)
            place = self._rng.randint(0, len(self._inbox))  # other threads' messages, any order
            self._inbox.insert(place, self._answer(load[1]))

    def _answer(self, ref: PrefixRef) -> PrefixAnswer:
        if self._faults and self._rng.random() < self.scenario.load_error_rate:
            self.seen["load failed"] += 1
            return PrefixLoadFailed(ref, LOAD_ERROR, 0.0)
        manifest = PrefixManifest(
            num_virtual_tokens=ref.num_virtual_tokens, k_space="none", model_type="hash"
        )
        return PrefixLoaded(ref, Prefix(ref.digest, manifest, (), ()), PrefixTier.DISK, 0.0)

    # ---- steps and their checks ----------------------------------------------------------------

    def _step(self) -> None:
        inbox, self._inbox = self._inbox, []
        pinned = {e.ref.digest for e in self.prefixes.entries() if e.pinned}
        order = self.scheduler._order
        # Who is about to end gives way before anybody else.
        before = {
            seq: (order[seq], seq.num_preemptions)
            for seq in self.scheduler._running
            if not seq.is_full
        }
        self.scheduler.committed, self.scheduler.broken = [], []
        pending = [s for s in order if s.is_pending]
        result = self.core.step(inbox)
        inbox = self._put_off + inbox
        self._step_broke = bool(self.scheduler.broken)
        self._num_broken_steps += len(self.scheduler.broken)
        assert self._num_broken_steps <= self.runner.num_step_errors, "a step failed by itself"
        self.num_steps += 1
        if self.core._put_off:
            self._put_off = inbox
            self._check_ended(result)
            return
        self._put_off = []
        plan = self.scheduler.plan
        self._check_pins(pinned, inbox, plan)
        self._check_preemptions(before)
        self._check_plan(plan)
        self._check_ended(result)
        for message in inbox:
            if isinstance(message, AbortRequest):
                self._check_aborted(message)
        moved = plan.rows or plan.prefix_loads or plan.prefix_requests or result.outputs
        self._num_idle = 0 if inbox or moved else self._num_idle + 1
        # One is fine: a prefix to be warmed that fits nowhere is given up in such a step.
        assert self._num_idle <= 1, "the engine says that it has work and does nothing"
        self._record(plan, result)
        self._record_overlap(pending, before)

    def _check_ended(self, result: StepResult) -> None:
        for committed in self.scheduler.committed:
            self._check_failed(committed, result)
        for output in result.outputs:
            self._take(output)

    def _check_pins(
        self,
        before: set[str],
        inbox: list[Message | PrefixAnswer | EngineCall],
        plan: SchedulerOutput,
    ) -> None:
        """A pin holds from the order on, through the load, until it is lifted, ends, or the load fails."""
        self._pins = {t: p for t, p in self._pins.items() if p[1] is None or p[1] > self.now}
        answers: list[object] = [answer.value for answer in plan.answers]
        for message in inbox:
            self._follow_order(message, answers)
        for broken in self.scheduler.broken:
            self._unpin({load.ref.digest for load in broken.prefix_loads})
        pinned = {ref.digest for ref, _ in self._pins.values()}
        for digest in before & pinned:
            assert digest in self.prefixes, "a pinned prefix was evicted"
        for entry in self.prefixes.entries():
            assert entry.pinned == (entry.ref.digest in pinned), "a pin was lost or invented"
        resident_or_coming = {e.ref.digest for e in self.prefixes.entries()}
        resident_or_coming |= self.scheduler._loads.wished.keys()
        self._unpin(pinned - resident_or_coming)  # these fit nowhere and were given up

    def _follow_order(
        self, message: Message | PrefixAnswer | EngineCall, answers: list[object]
    ) -> None:
        """The same order, carried out in the slow, obvious way, and the answer that it must have got."""
        match message:
            case PinTask(_, ref, ttl):
                fits = self._fits_budget(ref)
                self.seen["pin refused"] += not fits
                self._expect(answers.pop(0), fits)
                if fits:
                    self._pins[ref.task] = (ref, None if ttl is None else self.now + ttl)
            case FollowPin(_, ref):
                if ref.task not in self._pins:
                    assert answers.pop(0) is None
                    return
                fits = self._fits_budget(ref)
                self._expect(answers.pop(0), fits)
                _, until = self._pins.pop(ref.task)
                self._pins |= {ref.task: (ref, until)} if fits else {}
            case UnpinTask(task):
                self._pins.pop(task, None)
            case EvictPrefix(digest) | PrefixLoadFailed(PrefixRef(digest=digest)):
                self._unpin({digest})

    def _fits_budget(self, ref: PrefixRef) -> bool:
        others = [pinned for task, (pinned, _) in self._pins.items() if task != ref.task]
        lengths = {one.digest: one.num_virtual_tokens for one in [*others, ref]}
        needed = sum(-(-length // self.scenario.block_size) for length in lengths.values())
        return needed <= self.scenario.pin_budget * (self.scenario.num_blocks - 1)

    def _expect(self, answer: object, fits: bool) -> None:
        assert isinstance(answer, PinState)
        assert (answer.refusal is None) == fits, "the pin budget was not kept"

    def _unpin(self, digests: set[str]) -> None:
        self._pins = {t: p for t, p in self._pins.items() if p[0].digest not in digests}

    def _check_aborted(self, message: AbortRequest) -> None:
        left = [
            index
            for request_id, index in self._open
            if request_id == message.request_id and message.index in (None, index)
        ]
        assert not left, "an aborted choice goes on"

    def _check_preemptions(self, before: dict[Sequence, tuple[int, int]]) -> None:
        """Of a tenant's, the youngest goes first: nobody runs on who came after one that was preempted."""
        for tenant in self.scenario.tenants:
            own = [(seq, was) for seq, was in before.items() if seq.request.tenant == tenant]
            gone = [order for seq, (order, n) in own if seq.num_preemptions > n]
            kept = [
                order
                for seq, (order, n) in own
                if seq.num_preemptions == n and seq.status is SequenceStatus.RUNNING
            ]
            assert not gone or not kept or max(kept) < min(gone), "an older one was preempted"

    def _check_plan(self, plan: SchedulerOutput) -> None:
        s = self.scenario
        assert len(plan.rows) <= s.max_num_seqs
        assert plan.num_tokens <= s.max_num_batched_tokens
        for row in plan.rows:
            assert row.token_ids, "a row without tokens"
            request, end = row.sequence.request, row.start + len(row.token_ids)
            assert end <= len(request.prompt_token_ids) + len(row.sequence.output_token_ids)
            assert end < len(request.prompt_token_ids) + request.sampling.max_tokens, "in vain"
            self._check_writes(row)
        assert not self.scheduler.cached_block_ids & set(plan.wipe_block_ids), (
            "a shared block is wiped"
        )
        self._count_reuse(plan)

    def _check_writes(self, row: ScheduledRow) -> None:
        """What the prompt cache holds is never written."""
        size = self.scenario.block_size
        written = row.block_ids[row.start // size : -(-(row.start + len(row.token_ids)) // size)]
        assert not self.scheduler.cached_block_ids & set(written), "a shared block is written"

    def _count_reuse(self, plan: SchedulerOutput) -> None:
        size = self.scenario.block_size
        for row in plan.rows:
            seq, prompt = row.sequence, row.sequence.request.prompt_token_ids
            if seq.num_preemptions and row.start == self.scheduler.num_reused_tokens[seq] > 0:
                self.seen["found again after a preemption"] += len(row.token_ids) > 1
            elif row.start == seq.num_cached_tokens > 0:
                self.seen["cache hit"] += 1
                self.seen["cache hit up to the last block"] += row.start + size == len(prompt)
                asked_before = self._asked_before.get(seq.request.request_id, len(prompt))
                self.seen["cache hit in an answer"] += seq.num_cached_tokens > asked_before

    def _check_failed(self, plan: SchedulerOutput, result: StepResult) -> None:
        """What a failed row read or wrote can not be found any more."""
        failures = (ROW_ERROR, STEP_FAILED)
        ended = {(o.request_id, o.index) for o in result.outputs if o.error in failures}
        entries = {entry.block_id for entry in self.prompt_cache._entries.values()}
        for row in plan.rows:
            if (row.sequence.request.request_id, row.sequence.index) in ended:
                assert not entries & set(row.block_ids), "a failed row's block is still cached"

    def _take(self, output: SequenceOutput) -> None:
        key = (output.request_id, output.index)
        assert key in self._open, "an output after the last one"
        choice = self._open[key]
        assert 0 <= output.num_cached_tokens < len(choice.request.prompt_token_ids)
        if output.token_id is not None:
            choice.tokens.append(output.token_id)
        if output.finish_reason is None:
            assert output.token_id is not None, "an output that says nothing"
            return
        del self._open[key]
        self._told = [*self._told[-4:], (choice.request, tuple(choice.tokens))]
        self.seen[f"finished: {output.finish_reason}"] += 1
        self._check_tokens(choice, output)

    def _check_tokens(self, choice: _Open, output: SequenceOutput) -> None:
        expected = oracle(choice.request, output.index, choice.seed)
        match output.finish_reason:
            case FinishReason.STOP:
                assert choice.tokens == expected
                assert output.stop_token_id == expected[-1]
            case FinishReason.LENGTH:
                assert choice.tokens == expected
                assert len(expected) == choice.request.sampling.max_tokens
            case FinishReason.ABORT:
                assert choice.aborted, "nobody aborted it"
                assert choice.tokens == expected[: len(choice.tokens)]
            case _:
                assert choice.tokens == expected[: len(choice.tokens)]
                self._check_error(choice.request, output.error)

    def _check_error(self, request: GenerationRequest, error: str | None) -> None:
        """A request fails for a fault that was injected, or because pinned prefixes leave it no room."""
        if error == STEP_FAILED:
            assert self._step_broke, "the runner raised though no fault was injected"
            return
        if error in (LOAD_ERROR, ROW_ERROR):
            return
        assert error is not None
        assert error.startswith("the request needs"), error
        self.seen["refused for pins"] += 1
        pinned = sum(
            len(e.block_ids)
            for e in self.prefixes.entries()
            if e.pinned and e.ref.digest != (request.prefix and request.prefix.digest)
        )
        # The pin may be of a prefix that this very step failed to load.
        assert pinned > 0 or self._step_broke, "refused though nothing is pinned"

    def _record(self, plan: SchedulerOutput, result: StepResult) -> None:
        self.seen["blocks dropped"] += len(self.prompt_cache._dropped) > 0
        self.seen["preemption"] += plan.num_preemptions
        self.seen["eviction"] += sum(e.kind == "evict" for e in result.stats.events)
        self.seen["prefix load"] += len(plan.prefix_loads)
        rows = tuple(
            (int(row.sequence.request.request_id), row.start, row.token_ids, row.block_ids)
            for row in plan.rows
        )
        outputs = tuple(
            (
                int(o.request_id),
                o.index,
                -1 if o.token_id is None else o.token_id,
                -1 if o.finish_reason is None else _REASONS.index(o.finish_reason),
            )
            for o in result.outputs
        )
        self.trace = hash((self.trace, self.now, rows, outputs))

    def _record_overlap(
        self, pending: list[Sequence], before: dict[Sequence, tuple[int, int]]
    ) -> None:
        """What happened to sequences of which the step under way had a token to come."""
        under_way = self.scheduler._under_way
        rows = {row.sequence for row in under_way.rows} if under_way else set()
        for seq in pending:
            ended = seq.status is SequenceStatus.FINISHED
            self.seen["preempted with a token to come"] += seq.status is SequenceStatus.PREEMPTED
            self.seen["ended with a row under way"] += ended and seq in rows
            self.seen["ended by the step under way"] += ended and seq not in rows

    def _check_cached_words(self) -> None:
        """Nothing that was freed or wiped is in the cache, also if nobody came to read it."""
        size = self.scenario.block_size
        for block_id in self.prompt_cache.block_ids():
            words = self.blocks.memory[block_id * size : (block_id + 1) * size]
            assert not {POISON, WIPED} & set(words), "a cached block is not what was computed"

    def _check_rest(self) -> None:
        assert self._num_broken_steps == self.runner.num_step_errors, "a step failed unnoticed"
        assert self.scheduler.num_running == 0
        assert not self.scheduler._order, "a sequence is left"
        assert not self.scheduler.staged, "a staged prefix is left"
        assert not self.scheduler._loads.loading, "a load is waited for that was answered"
        assert not self.scheduler._loads.wished, "a prefix was to be warmed and was forgotten"
        assert not self.core._staged, "tensors are left in host memory"
        cached = self.prompt_cache.num_blocks
        assert cached == self.prompt_cache.num_evictable_blocks, (
            "a cached block has a reader at rest"
        )
        assert self.blocks.num_used == self.prefixes.num_blocks + cached, "blocks are left"
        self._check_cached_words()
        self.prompt_cache.make_room(self.blocks.capacity)
        self._inbox += [EvictPrefix(entry.ref.digest) for entry in self.prefixes.entries()]
        self.turn()
        assert self.blocks.num_used == 0, "a prefix could not be evicted at rest"


@dataclass(frozen=True, slots=True)
class Episode:
    """What one episode did; equal for equal seeds."""

    trace: int
    num_steps: int
    seen: Counter[str]


def run_episode(seed: int, num_ticks: int = 300) -> Episode:
    """One scenario from its first request to rest. Raises AssertionError on any broken promise."""
    world = World(seed)
    try:
        for _ in range(num_ticks):
            world.tick()
        world.drain()
    except Exception as error:
        error.add_note(f"seed {seed}, tick {world.now}, step {world.num_steps}: {world.scenario}")
        raise
    world.seen["row failed"] += world.runner.num_row_errors
    world.seen["step failed"] += world.runner.num_step_errors
    return Episode(world.trace, world.num_steps, world.seen)
