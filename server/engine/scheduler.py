"""Decides what each step runs: a pure state machine, `schedule(now, inbox)`, `advance(plan)`, `commit(plan, outcomes)`.

Owned by the engine thread; called by `EngineCore` only. No torch, no clock, no thread, no randomness: the
same calls give the same plans, so it can be simulated without a model.

`advance` comes when a plan was launched, `commit` when it has ended. In between one more step may be scheduled and launched:
it builds on tokens that only the device knows (`PENDING`), on what the plan under way computes, and on the prefixes that it writes. What a
step frees may be given away in the next, as the device performs one after the other.

Policy, in order:
1. running sequences go on: first those that decode one token, then those with prompt left to compute;
2. a sequence that needs a block gets one by evicting what is idle (`Room`), then by preempting the youngest of the tenant
   that had the most;
3. waiting sequences are admitted by their tenants' turns (`FairShares`), a tenant's own first come first served, all blocks or
   nothing. One whose prefix is not at hand, or whose next block of prompt is just being computed for another, steps aside and
   does not hold up those behind it; one that finds no room does.
What the prompt cache has of a sequence's tokens is not computed again, and costs nothing of a step's budget.
Whoever is preempted waits until there is room for all of it, so those that remain come to an end.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace
from itertools import count, islice

from server.engine.device_orders import DeviceOrders
from server.engine.fair_shares import OUTPUT_TOKEN, PROMPT_TOKEN, FairShares, by_turns
from server.engine.messages import (
    MAX_TOLD_TOKENS,
    AbortRequest,
    AddRequest,
    Message,
    PrefixFailed,
    PrefixLoad,
    PrefixReady,
    RowOutcome,
    ScheduledRow,
    SchedulerOutput,
    SequenceOutput,
)
from server.engine.prefix_loads import PrefixLoads
from server.engine.sequence import PENDING, Sequence, SequenceStatus
from server.engine.step_plan import StepPlan, computes
from server.kvcache.block_pool import BlockPool
from server.kvcache.pins import Pins
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.kvcache.room import Room
from server.types import FinishReason, PrefixRef, PrefixTier


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`max_num_batched_tokens` bounds the own tokens of a step, `max_num_seqs` the running set.

    `pin_budget`: the share of the blocks that pinned prefixes may take, 0 to 1.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    pin_budget: float = 1.0

    def __post_init__(self) -> None:
        assert 1 <= self.max_num_seqs <= self.max_num_batched_tokens
        assert 0 <= self.pin_budget <= 1


class Scheduler:
    """Owns every sequence, and through `blocks`, `prefixes` and `prompt_cache` every block.

    Invariants: a sequence is in `_waiting` or `_running` or finished; it holds blocks and a lease exactly
    while running; a prefix is absent, loading, staged (host memory) or resident.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        prefixes: ResidentPrefixes,
        prompt_cache: PromptCache,
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._prefixes = prefixes
        self._prompt_cache = prompt_cache
        self._room = Room(blocks, prefixes, prompt_cache)
        self._pins = Pins(blocks, prefixes, int(blocks.capacity * limits.pin_budget))
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []
        self._order: dict[Sequence, int] = {}  # arrival number of every live sequence
        self._arrivals = count()
        self._loads = PrefixLoads(prefixes, limits.max_num_seqs)
        self._shares = FairShares()
        # A step takes so few tokens of prompts that are told; a token of them has as much of it as many others.
        self._told_cost = max(limits.max_num_batched_tokens / MAX_TOLD_TOKENS, 1.0)
        self._device_orders = DeviceOrders(prefixes, self._pins, self._loads, prompt_cache)
        self._under_way: SchedulerOutput | None = None
        self._wipe_block_ids: list[int] = []  # of rows that failed, for the next plan
        self._ended: list[SequenceOutput] = []  # outside of a step

    # ---- what others may see -------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - self.num_waiting_for_prefix

    @property
    def num_waiting_for_prefix(self) -> int:
        return sum(s.status is SequenceStatus.WAITING_FOR_PREFIX for s in self._waiting)

    @property
    def staged(self) -> frozenset[str]:
        """Digests whose tensors must stay in host memory for a load to come."""
        return frozenset(self._loads.staged)

    @property
    def needs_tokens(self) -> bool:
        """Whether a sequence must not run before its pending token is known: one with penalties, which count tokens."""
        pending = [s for s in self._running if s.is_pending and not s.is_full]
        return any(seq.request.sampling.has_penalties for seq in pending)

    @property
    def _num_going_on(self) -> int:
        """Running sequences, without those that end with the step under way."""
        return sum(not seq.is_full for seq in self._running)

    def has_work(self) -> bool:
        """Whether a step now could do anything without another message."""
        if self._running or self._ended:
            return True
        wanted, loads = {s.digest for s in self._waiting} | self._loads.wished.keys(), self._loads
        return any(d is None or loads.at_hand(d) or loads.may_request(d) for d in wanted)

    # ---- plan ----------------------------------------------------------------------------------

    def schedule(self, now: float, inbox: Iterable[Message] = ()) -> SchedulerOutput:
        """Takes in the messages and plans one step. May be empty of rows."""
        step = StepPlan(
            self._limits.max_num_batched_tokens, wipe_block_ids=tuple(self._wipe_block_ids)
        )
        self._wipe_block_ids.clear()
        self._pins.expire(now)
        if not self._order:
            self._shares.forget()
        for message in inbox:
            self._receive(message, step, now)
        self._continue_running(step)
        self._load_wished(step)
        self._admit_waiting(step, now)
        if self._loads.staged:
            self._loads.keep_only({seq.digest for seq in self._waiting})
        return step.finished_plan()

    def _receive(self, message: Message, step: StepPlan, now: float) -> None:
        match message:
            case AddRequest(request, seed, arrival):
                for index in range(request.sampling.n):
                    seq = Sequence(request, index, seed + index, arrival)
                    self._order[seq] = next(self._arrivals)
                    self._waiting.append(seq)
            case AbortRequest(request_id, index):
                for seq in self._live(request_id, index):
                    self._finish(seq, FinishReason.ABORT)
            case PrefixReady(digest, tier):
                self._prefix_ready(digest, tier)
            case PrefixFailed(digest, reason):
                self._prefix_failed(digest, reason)
            case _:
                answer = self._device_orders.carry_out(message, now)
                step.answers += [] if answer is None else [answer]

    def _live(self, request_id: str, index: int | None) -> list[Sequence]:
        return [
            s
            for s in self._order
            if s.request.request_id == request_id and index in (None, s.index)
        ]

    def _prefix_ready(self, digest: str, tier: PrefixTier) -> None:
        waiting = self._waiting if self._loads.came(digest, tier) else []
        for seq in waiting:
            if seq.digest == digest and seq.prefix_tier is None:
                seq.prefix_tier = tier

    def _prefix_failed(self, digest: str, reason: str) -> None:
        self._loads.loading.discard(digest)
        self._device_orders.give_up(digest)
        for seq in [s for s in self._waiting if s.digest == digest]:
            self._finish(seq, FinishReason.PREFIX_UNAVAILABLE, error=reason)

    # ---- running sequences ---------------------------------------------------------------------

    def _continue_running(self, step: StepPlan) -> None:
        going_on = [s for s in self._running if not s.is_full]
        decoding = [s for s in going_on if s.num_uncomputed_tokens == 1]
        prefilling = [s for s in going_on if s.num_uncomputed_tokens > 1]
        for seq in decoding + prefilling:
            if step.budget == 0:
                break
            if seq.status is not SequenceStatus.RUNNING:
                continue  # an earlier sequence of this loop has preempted it
            if seq.num_uncomputed_tokens > 1:
                # Another may have computed meanwhile what this one has still before it.
                self._count_hits(seq, 0, self._reuse(seq))
            if self._grow(seq, step):
                step.add_row(seq)

    def _reuse(self, seq: Sequence) -> int:
        """Takes what the prompt cache has of it. Returns tokens gained."""
        size, before = self._blocks.block_size, seq.num_computed_tokens
        leased = self._prompt_cache.reuse(
            seq.chain, seq.block_table, seq.token_ids, self._num_reusable(seq)
        )
        seq.num_computed_tokens = max(before, leased * size)
        return seq.num_computed_tokens - before

    def _num_reusable(self, seq: Sequence) -> int:
        """Blocks that may come out of the prompt cache: never the last token's, nor others' whose logits are wanted."""
        return min(seq.num_tokens - 1, seq.num_told_tokens) // self._blocks.block_size

    def _count_hits(self, seq: Sequence, num_asked_tokens: int, num_hit_tokens: int) -> None:
        """What a preempted sequence finds again was computed for itself, and is no hit."""
        if seq.num_preemptions == 0:
            seq.num_cached_tokens += num_hit_tokens
            self._prompt_cache.count(num_asked_tokens, num_hit_tokens)

    def _grow(self, seq: Sequence, step: StepPlan) -> bool:
        """Gives `seq` blocks for all its tokens; False if that cost it its own place."""
        needed = self._blocks.blocks_for(seq.num_tokens) - len(seq.block_table)
        while self._blocks.num_free < needed:
            self._room.make(needed)
            if self._blocks.num_free >= needed:
                break
            victim = max(self._running, key=self._gives_way)
            self._preempt(victim, step)
            if victim is seq:
                return False
        seq.block_table += self._blocks.allocate(max(0, needed))
        return True

    def _gives_way(self, seq: Sequence) -> tuple[bool, float, int]:
        """The greatest goes first: one that is about to end, then of the tenant that had the most the youngest."""
        return seq.is_full, self._shares.counter(seq.request.tenant), self._order[seq]

    def _preempt(self, seq: Sequence, step: StepPlan) -> None:
        """Takes everything from a sequence; it will compute its tokens again."""
        step.take_back(seq)
        self._give_back(seq)
        self._running.remove(seq)
        seq.num_preemptions += 1
        seq.become(SequenceStatus.PREEMPTED)
        # Back to its place by arrival: those who came later stay behind it.
        position = sum(self._order[s] < self._order[seq] for s in self._waiting)
        self._waiting.insert(position, seq)
        step.num_preemptions += 1

    # ---- waiting sequences ---------------------------------------------------------------------

    def _admit_waiting(self, step: StepPlan, now: float) -> None:
        """In turn, until somebody finds no place; those next in line have their prefixes loaded while they wait."""
        at_hand = [s for s in self._waiting if self._could_start(s)]
        self._shares.join(s.request.tenant for s in at_hand)
        aside = set[Sequence]()
        for seq in self._shares.in_turn(at_hand):
            still = self._prefix_at_hand(seq, step)  # room for another may have cost it its prefix
            # Those whose prompts are told take turns: else they would hold places and blocks, and idle.
            idle = seq.is_full or (step.told_budget == 0 and seq.num_to_tell > 0)
            if not still or idle or self._is_anticipated(seq, step):
                aside.add(seq)
            elif not self._has_place(seq, step) or not self._admit(seq, step, now):
                break
        left = [s for s in self._waiting if s not in aside and self._could_start(s)]
        self._shares.keep_waiting(s.request.tenant for s in left)
        # Behind many who wait for room, a prefix would come long before it is wanted.
        for seq in islice(by_turns(self._waiting), self._limits.max_num_seqs if left else None):
            self._prefix_at_hand(seq, step)

    def _could_start(self, seq: Sequence) -> bool:
        return seq.digest is None or self._loads.at_hand(seq.digest)

    def _has_place(self, seq: Sequence, step: StepPlan) -> bool:
        # One that was preempted with a token to come may be about to end.
        full = step.budget == 0 or self._num_going_on >= self._limits.max_num_seqs
        return not full and not seq.is_pending

    def _is_anticipated(self, seq: Sequence, step: StepPlan) -> bool:
        """Whether a row of this step, or of the one under way, computes the next block that the sequence would: it has
        it for nothing then.
        """
        num_blocks = self._num_reusable(seq)
        key = self._prompt_cache.missing_key(seq.chain, seq.token_ids, num_blocks)
        under_way = self._under_way.rows if self._under_way else ()
        rows = [r for r in under_way if r.sequence.status is SequenceStatus.RUNNING]
        return key is not None and computes((*step.rows.values(), *rows), key)

    def _prefix_at_hand(self, seq: Sequence, step: StepPlan) -> bool:
        """Whether the sequence could start; asks for its prefix, once, if not."""
        digest = seq.digest
        if digest is None:
            seq.prefix_tier = PrefixTier.NONE
            return True
        if self._loads.at_hand(digest):
            if seq.prefix_tier is None:
                seq.prefix_tier = self._loads.tier(digest)
            return True
        assert seq.request.prefix is not None
        self._loads.request(seq.request.prefix, step)
        if digest in self._loads.loading and seq.status is not SequenceStatus.WAITING_FOR_PREFIX:
            seq.become(SequenceStatus.WAITING_FOR_PREFIX)
        return False

    def _admit(self, seq: Sequence, step: StepPlan, now: float) -> bool:
        """Moves a sequence to the running set with all its blocks, or leaves everything as it was."""
        self._reuse(seq)
        num_reused = len(seq.block_table)
        needed = self._blocks.blocks_for(seq.num_tokens) - num_reused
        digest = seq.digest
        if digest is not None and digest in self._prefixes:
            seq.lease = self._prefixes.acquire(digest)  # so that making room does not evict it
        elif digest is not None:
            needed += self._blocks.blocks_for(seq.num_virtual_tokens)
        # One block in reserve for each running sequence: else the next step would preempt the newcomer.
        if not self._make_room(needed, reserve=self._num_going_on):
            self._give_back(seq)
            if not self._running:
                self._refuse_for_pins(seq, needed + num_reused)
            return False
        if digest is not None and seq.lease is None:
            assert seq.request.prefix is not None
            self._reserve(seq.request.prefix, step)
            self._shares.charge(seq.request, PROMPT_TOKEN * seq.num_virtual_tokens)
            seq.lease = self._prefixes.acquire(digest)
        own = self._blocks.blocks_for(seq.num_tokens) - num_reused
        seq.block_table += self._blocks.allocate(own)
        self._waiting.remove(seq)
        self._running.append(seq)
        seq.become(SequenceStatus.RUNNING)
        # What is computed again after a preemption was another's doing.
        num_new = 0 if seq.num_preemptions else seq.num_uncomputed_tokens
        num_told = 0 if seq.num_preemptions else seq.num_to_tell
        cost = num_new + num_told * (self._told_cost - 1)
        self._shares.serve(seq.request, PROMPT_TOKEN * cost)
        if seq.first_scheduled is None:
            seq.first_scheduled = now
            self._count_hits(seq, seq.num_tokens, seq.num_computed_tokens)
        step.add_row(seq)
        return True

    def _make_room(self, needed: int, reserve: int) -> bool:
        """Evicts what is idle until `needed` blocks are free; evicts none if that can not succeed."""
        if self._room.num_blocks < needed + reserve:
            return False
        self._room.make(needed)
        return True

    def _reserve(self, ref: PrefixRef, step: StepPlan) -> None:
        """Staged -> resident: blocks now, tensors in the step being planned."""
        self._loads.take(ref.digest)
        resident = self._prefixes.reserve(ref)
        step.prefix_loads.append(PrefixLoad(ref, resident.block_ids))
        self._pins.mark(ref.digest)

    def _refuse_for_pins(self, seq: Sequence, needed: int) -> None:
        """With nothing running, only pinned prefixes can be in the way, and they will not go."""
        self._finish(
            seq,
            FinishReason.ERROR,
            error=f"the request needs {needed} KV blocks; the pool has {self._blocks.capacity}, "
            f"of which pinned prefixes hold {self._prefixes.num_blocks}",
        )

    def _load_wished(self, step: StepPlan) -> None:
        """Makes asked-for prefixes resident where there is room without disturbing a sequence."""
        for digest, ref in list(self._loads.wished.items()):
            if digest not in self._loads.staged:
                self._loads.request(ref, step)
            elif self._make_room(
                self._blocks.blocks_for(ref.num_virtual_tokens), len(self._running)
            ):
                self._reserve(ref, step)
            elif not self._running:
                self._device_orders.give_up(digest)  # it can not fit beside what is pinned

    # ---- results -------------------------------------------------------------------------------

    def take_ended(self) -> list[SequenceOutput]:
        """Those that ended while a step was scheduled: aborted, or without their prefix."""
        ended, self._ended = self._ended, []
        return ended

    def advance(self, plan: SchedulerOutput) -> None:
        """The plan was launched: what its rows compute and sample, the next one builds on."""
        for row in plan.rows:
            row.sequence.num_computed_tokens += len(row.token_ids)
            if row.sample:
                row.sequence.output_token_ids.append(PENDING)
        self._under_way = plan

    def commit(
        self, plan: SchedulerOutput, outcomes: Sequence_[RowOutcome]
    ) -> list[SequenceOutput]:
        """Takes in what came of `plan`, one outcome per row; returns what clients gain."""
        assert len(outcomes) == len(plan.rows)
        if self._under_way is plan:
            self._under_way = None
        outputs = [self._commit_row(r, o) for r, o in zip(plan.rows, outcomes, strict=True)]
        return [output for output in outputs if output is not None]

    def _commit_row(self, row: ScheduledRow, outcome: RowOutcome) -> SequenceOutput | None:
        seq, num_tokens = row.sequence, row.start + len(row.token_ids)
        if outcome.error is not None:
            self._prompt_cache.drop(seq.chain)
        if seq.status is SequenceStatus.FINISHED:
            return None  # aborted meanwhile, or its last token was known only when this step was launched
        if outcome.error is not None:
            return self._end_failed(seq, outcome.error)
        seq.take_prompt_logprobs(row.told_from, outcome.prompt_logprobs)
        if not row.sample:
            return None
        assert outcome.token_id is not None, "a sampling row has a token or an error"
        if seq.status is SequenceStatus.RUNNING:
            # One that was preempted meanwhile has no blocks. And only now: finite logits, that read them all, speak for
            # the blocks. Those of answers are asked for again by the next turn of a conversation, and by this sequence
            # after a preemption.
            num_full = num_tokens // self._blocks.block_size
            self._prompt_cache.enter(seq.chain, seq.block_table, seq.token_ids, num_full)
        count = seq.settle(num_tokens, outcome.token_id)
        self._shares.charge(seq.request, OUTPUT_TOKEN)
        reason = seq.finish_reason(count, self._limits.eos_token_ids)
        if reason is None:
            output = self._output(seq, outcome.token_id)
        else:
            output = self._end(seq, reason, token_id=outcome.token_id)
        told = tuple(seq.prompt_logprobs) if count == 1 else ()
        if told or outcome.logprob:
            return replace(output, logprob=outcome.logprob, prompt_logprobs=told)
        return output

    def _end_failed(self, seq: Sequence, error: str) -> SequenceOutput:
        """Nobody meets what a failed row has written: its own blocks are wiped.

        One that it gave back while the step was under way may be another's already, who reads only what he wrote.
        """
        self._wipe_block_ids += seq.block_table[len(seq.chain.blocks) :]
        return self._end(seq, FinishReason.ERROR, error=error)

    def fail(self, plan: SchedulerOutput, error: str) -> list[SequenceOutput]:
        """`plan` could not be performed: its rows end, and prefixes that it was to load are not trusted."""
        outputs = self.commit(plan, [RowOutcome(error=error)] * len(plan.rows))
        doubtful = {load.ref.digest for load in plan.prefix_loads}
        # They began while the plan was under way.
        began = [s for s in self._running if s.digest in doubtful]
        for seq in began:
            self._prompt_cache.drop(seq.chain)
        outputs += [self._end_failed(seq, error) for seq in began]
        for digest in doubtful:
            self._pins.lift_digest(digest)
            self._prefixes.retire(digest)
        return outputs

    def _finish(self, seq: Sequence, reason: FinishReason, *, error: str | None = None) -> None:
        self._ended.append(self._end(seq, reason, error=error))

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        *,
        token_id: int | None = None,
        error: str | None = None,
    ) -> SequenceOutput:
        """Removes a sequence from wherever it stands and gives back all it held."""
        self._give_back(seq)
        (self._running if seq.status is SequenceStatus.RUNNING else self._waiting).remove(seq)
        del self._order[seq]
        seq.become(SequenceStatus.FINISHED)
        return self._output(seq, token_id, reason, error)

    def _output(
        self,
        seq: Sequence,
        token_id: int | None,
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> SequenceOutput:
        started = seq.first_scheduled
        return SequenceOutput(
            request_id=seq.request.request_id,
            index=seq.index,
            token_id=token_id,
            finish_reason=reason,
            stop_token_id=token_id if reason is FinishReason.STOP else None,
            error=error,
            prefix_tier=seq.prefix_tier or PrefixTier.NONE,
            queue_seconds=None if started is None else started - seq.arrival,
            num_cached_tokens=seq.num_cached_tokens,
        )

    def _give_back(self, seq: Sequence) -> None:
        self._prompt_cache.give_back(seq.chain, seq.block_table)
        self._release(seq)
        seq.num_computed_tokens = 0

    def _release(self, seq: Sequence) -> None:
        if seq.lease is not None:
            self._prefixes.release(seq.lease)
            seq.lease = None

    # ---- self-check ----------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Recomputes the class invariants from scratch; for tests and the debug loop."""
        self._blocks.check_invariants()
        self._prefixes.check_invariants()
        self._prompt_cache.check_invariants(seq.chain for seq in self._order)
        self._pins.check_invariants()
        self._loads.check_invariants()
        pool = self._blocks.capacity * self._blocks.block_size
        self._shares.check_invariants((OUTPUT_TOKEN + PROMPT_TOKEN * self._told_cost) * pool)
        wished = self._loads.wished.keys() | {
            entry.ref.digest for entry in self._prefixes.entries()
        }
        assert self._pins.digests() <= wished, "a pinned prefix is neither resident nor on its way"
        assert set(self._waiting) | set(self._running) == set(self._order)
        assert not set(self._waiting) & set(self._running)
        assert self._num_going_on <= self._limits.max_num_seqs
        orders = [self._order[s] for s in self._waiting]
        assert orders == sorted(orders), "waiting sequences keep their order of arrival"
        assert all(s.status is SequenceStatus.RUNNING for s in self._running)
        assert all(not s.block_table and s.lease is None for s in self._waiting)
        assert not any(s.chain.blocks or s.num_computed_tokens for s in self._waiting)
        rows = self._under_way.rows if self._under_way else ()
        sampling = {row.sequence for row in rows if row.sample}
        assert {s for s in self._order if s.is_pending} <= sampling, "a token is waited for in vain"
        self._check_blocks()

    def _check_blocks(self) -> None:
        owned = [b for s in self._running for b in s.block_table[len(s.chain.blocks) :]]
        held = [b for e in self._prefixes.entries() for b in e.block_ids]
        held += self._prompt_cache.block_ids()
        assert len(owned + held) == len(set(owned + held)), "a block has two owners"
        assert len(owned + held) == self._blocks.num_used, "a block leaked"
        leases = {e.ref.digest: 0 for e in self._prefixes.entries()}
        for seq in self._running:
            assert len(seq.block_table) >= self._blocks.blocks_for(seq.num_computed_tokens)
            shared = [block.block_id for block in seq.chain.blocks]
            assert seq.block_table[: len(shared)] == shared, "a leased block is not the one read"
            assert len(shared) * self._blocks.block_size <= seq.num_computed_tokens
            assert (seq.lease is None) == (seq.digest is None)
            if seq.lease is not None:
                assert seq.lease.resident.ref.digest == seq.digest, "a lease of another version"
                leases[seq.lease.resident.ref.digest] += 1
        for entry in self._prefixes.entries():
            assert entry.num_leases == leases[entry.ref.digest], "a lease leaked"
