"""The order of a step: what is launched before what is waited for, and what must not be. See `test_scheduler.py` for the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from prefix_store.artifact import Prefix
from server.engine.calls import EngineCall
from server.engine.core import STEP_FAILED, EngineCore, EngineParts
from server.engine.messages import AbortRequest, AddRequest, RowOutcome, SchedulerOutput
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import PENDING
from server.engine.sequence import Sequence as Sequence_
from server.engine.step_plan import StepPlan
from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import FinishReason, GenerationRequest, SamplingParams, StepStats

EOS = 2


@dataclass
class Device:
    """Notes when a step is launched and when it is asked for. Says 10, 11, 12, ... unless `says` has it otherwise."""

    says: dict[int, int] = field(default_factory=dict)  # by number of step
    breaks_at_launch: set[int] = field(default_factory=set)
    breaks_later: set[int] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    plans: list[SchedulerOutput] = field(default_factory=list)
    fed_back: list[Sequence_] = field(default_factory=list)
    waits: Callable[[int], None] | None = None

    def launch(self, plan: SchedulerOutput, staged: Mapping[str, Prefix]) -> Flight:
        number = len(self.plans)
        self.plans.append(plan)
        self.log.append(f"launch {number}")
        if number in self.breaks_at_launch:
            raise RuntimeError("no launch")
        pending = [row.sequence for row in plan.rows if row.token_ids[-1] == PENDING]
        assert all(seq in self.fed_back for seq in pending), "the step before did not sample it"
        self.fed_back = [row.sequence for row in plan.rows if row.sample]
        return Flight(self, number)


@dataclass
class Flight:
    device: Device
    number: int

    def outcomes(self) -> Sequence[RowOutcome]:
        self.device.log.append(f"wait {self.number}")
        if self.device.waits is not None:
            self.device.waits(self.number)
        if self.number in self.device.breaks_later:
            raise RuntimeError("the device broke")
        token_id = self.device.says.get(self.number, 10 + self.number)
        rows = self.device.plans[self.number].rows
        return [RowOutcome(token_id if row.sample else None) for row in rows]


@dataclass
class Engine:
    overlapped: bool = True
    num_blocks: int = 50
    device: Device = field(default_factory=Device)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, tuple[FinishReason, str | None]] = field(default_factory=dict)
    steps: list[StepStats] = field(default_factory=list)  # those in which something was computed
    max_num_seqs: int = 8
    now: float = 0.0

    def __post_init__(self) -> None:
        blocks = BlockPool(self.num_blocks, 4)
        prefixes, cache = ResidentPrefixes(blocks), PromptCache(blocks)
        limits = SchedulerLimits(self.max_num_seqs, 64, frozenset({EOS}))
        scheduler = Scheduler(limits, blocks, prefixes, cache)
        parts = EngineParts(
            scheduler, blocks, prefixes, cache, self.device, 1, overlapped=self.overlapped
        )
        self.core = EngineCore(parts, lambda _: None, lambda: self.now, debug=True)

    def step(self, *messages: Any) -> None:
        result = self.core.step(messages)
        self.steps += [result.stats] if result.stats.num_scheduled_requests else []
        for output in result.outputs:
            tokens = self.tokens.setdefault(output.request_id, [])
            tokens += [] if output.token_id is None else [output.token_id]
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason, output.error

    def run(self) -> None:
        while self.core.has_work():
            self.step()


def ask(name: str, **sampling: Any) -> AddRequest:
    values = {"max_tokens": 3, "temperature": 0.0} | sampling
    return AddRequest(GenerationRequest(name, (7, 8, 9), SamplingParams(**values)), 0, 0.0)


def test_a_step_is_launched_before_the_one_before_it_is_waited_for() -> None:
    engine = Engine()
    engine.step(ask("a"))
    engine.run()

    assert engine.device.log == [
        "launch 0",
        "launch 1",
        "wait 0",
        "launch 2",
        "wait 1",
        "launch 3",
        "wait 2",
        "wait 3",
    ]
    assert [row.token_ids for plan in engine.device.plans[:3] for row in plan.rows] == [
        (7, 8, 9),
        (PENDING,),
        (PENDING,),
    ]
    assert engine.device.plans[3].rows == (), "it has all its tokens; nothing is computed in vain"
    assert engine.tokens["a"] == [10, 11, 12]
    assert engine.ended["a"] == (FinishReason.LENGTH, None)


def test_without_overlap_a_step_is_waited_for_at_once() -> None:
    engine = Engine(overlapped=False)
    engine.step(ask("a", max_tokens=2))
    engine.run()

    assert engine.device.log == ["launch 0", "wait 0", "launch 1", "wait 1"]
    assert engine.device.plans[1].rows[0].token_ids == (10,)
    assert engine.tokens["a"] == [10, 11]


def test_a_stop_is_known_one_step_late_and_the_client_sees_nothing_of_it() -> None:
    engine = Engine(device=Device(says={1: EOS}))
    engine.step(ask("a", max_tokens=9))
    engine.run()

    assert len([plan for plan in engine.device.plans if plan.rows]) == 3, "one in vain"
    assert engine.tokens["a"] == [10, EOS]
    assert engine.ended["a"] == (FinishReason.STOP, None)


def test_an_abort_ends_a_request_whose_token_is_under_way() -> None:
    engine = Engine()
    engine.step(ask("a", max_tokens=9))
    engine.step()
    engine.step(AbortRequest("a"))
    assert engine.tokens["a"] == [10]
    assert engine.ended["a"] == (FinishReason.ABORT, None)
    engine.run()
    assert engine.tokens["a"] == [10]


def test_penalties_wait_for_the_tokens_that_they_count() -> None:
    engine = Engine()
    engine.step(ask("a", frequency_penalty=1.0))
    engine.run()

    assert engine.device.log[:4] == ["launch 0", "wait 0", "launch 1", "wait 1"]
    assert engine.device.plans[1].rows[0].token_ids == (10,)
    assert engine.tokens["a"] == [10, 11, 12]


def test_a_call_runs_when_no_step_is_under_way() -> None:
    engine = Engine()
    engine.step(ask("a"))
    call = EngineCall(lambda: engine.device.log.append("call"))
    engine.step(call)
    assert engine.tokens["a"] == [10], "who waits for a token does not wait for the call"
    assert engine.device.log == ["launch 0", "wait 0"]
    engine.run()

    assert engine.device.log[:4] == ["launch 0", "wait 0", "call", "launch 1"]
    assert engine.tokens["a"] == [10, 11, 12]


@pytest.mark.parametrize("device", [Device(breaks_at_launch={1}), Device(breaks_later={1})])
def test_a_step_that_breaks_ends_its_requests_and_no_others(device: Device) -> None:
    engine = Engine(device=replace(device, log=[], plans=[], fed_back=[]))
    engine.step(ask("a"))
    engine.step(ask("b"))
    engine.step(ask("c"))
    engine.run()

    failed, whole = (FinishReason.ERROR, STEP_FAILED), (FinishReason.LENGTH, None)
    assert engine.ended == {"a": failed, "b": failed, "c": whole}
    assert engine.tokens["a"] == [10]
    assert engine.tokens["b"] == []
    assert len(engine.tokens["c"]) == 3
    assert engine.core._parts.blocks.num_used == engine.core._parts.prompt_cache.num_blocks


def test_what_a_failed_row_wrote_is_wiped_before_the_next_step() -> None:
    engine = Engine(overlapped=False, device=Device(breaks_later={1}))
    engine.step(ask("a"))
    engine.step()
    engine.step(ask("b"))

    [row] = engine.device.plans[1].rows
    assert engine.device.plans[2].wipe_block_ids == row.block_ids


def test_who_waits_for_a_block_that_the_step_under_way_computes_finds_it() -> None:
    engine = Engine()
    prompt = tuple(range(20, 37))
    requests = [GenerationRequest(n, prompt, SamplingParams(max_tokens=5)) for n in "ab"]
    engine.step(AddRequest(requests[0], 0, 0.0))
    engine.step(AddRequest(requests[1], 0, 0.0))
    assert len(engine.device.plans[1].rows) == 1, "b waits"
    engine.step()
    second = next(r for r in engine.device.plans[2].rows if r.sequence.request.request_id == "b")
    assert (second.start, len(second.token_ids)) == (16, 1)


def test_who_is_about_to_end_takes_nobodys_place() -> None:
    """All places are taken by sequences that end with the step under way: the next plan has others in them."""
    engine = Engine(max_num_seqs=2)
    engine.step(*(ask(name, max_tokens=1) for name in "abcd"))
    engine.step()
    named = [[r.sequence.request.request_id for r in p.rows] for p in engine.device.plans]
    assert named == [["a", "b"], ["c", "d"]]


def test_who_is_about_to_end_gives_way_before_anybody_else() -> None:
    """The pool is full: what comes free a moment later is not worth a preemption."""
    engine = Engine(num_blocks=1 + 2)
    engine.step(ask("goes-on", max_tokens=5), ask("ends", max_tokens=1))
    engine.run()
    assert {name: len(tokens) for name, tokens in engine.tokens.items()} == {
        "ends": 1,
        "goes-on": 5,
    }
    beginnings = [r for plan in engine.device.plans for r in plan.rows if r.start == 0]
    assert len(beginnings) == 2, "nobody is computed again"


def test_a_preempted_prompt_does_not_wait_for_itself() -> None:
    """Its own row under way was to enter the block that it would now compute again."""
    engine = Engine()
    engine.step(ask("old", max_tokens=20))
    scheduler = engine.core._scheduler
    scheduler._limits = replace(scheduler._limits, max_num_batched_tokens=9)
    long = GenerationRequest("long", tuple(range(30, 50)), SamplingParams(max_tokens=2))
    engine.step(AddRequest(long, 0, 0.0))
    [seq] = [s for s in scheduler._order if s.request.request_id == "long"]
    scheduler._preempt(seq, StepPlan(0))  # as for want of blocks
    small = GenerationRequest("small", (60, 61), SamplingParams(max_tokens=2))
    engine.step(AddRequest(small, 0, 0.0))

    names = [[r.sequence.request.request_id for r in p.rows] for p in engine.device.plans]
    assert names == [["old"], ["old", "long"], ["old", "long"]]


@pytest.mark.parametrize("overlapped", [True, False])
def test_a_steps_time_is_told_with_its_own_rows(overlapped: bool) -> None:
    engine = Engine(overlapped=overlapped)

    def wait(number: int) -> None:
        engine.now += [0.3, 0.01][min(number, 1)]  # the prompt, then tokens

    engine.device.waits = wait
    engine.step(ask("a", max_tokens=3))
    engine.run()

    told = [(s.num_prefill_tokens, s.num_decode_tokens) for s in engine.steps]
    assert told == [(3, 0), (0, 1), (0, 1)]
    assert [s.duration_seconds for s in engine.steps] == pytest.approx([0.3, 0.01, 0.01])
