"""The order of a step: what is launched before what is waited for, and what must not be. See `test_scheduler.py` for the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from prefix_store.artifact import Prefix
from server.engine.calls import EngineCall
from server.engine.core import STEP_FAILED, EngineCore, EngineParts
from server.engine.messages import AbortRequest, AddRequest, RowOutcome, SchedulerOutput
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import PENDING
from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import FinishReason, GenerationRequest, SamplingParams

EOS = 2


@dataclass
class Device:
    """Notes when a step is launched and when it is asked for. Says 10, 11, 12, ... unless `says` has it otherwise."""

    says: dict[int, int] = field(default_factory=dict)  # by number of step
    breaks_at_launch: set[int] = field(default_factory=set)
    breaks_later: set[int] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    plans: list[SchedulerOutput] = field(default_factory=list)

    def launch(self, plan: SchedulerOutput, staged: Mapping[str, Prefix]) -> Flight:
        number = len(self.plans)
        self.plans.append(plan)
        self.log.append(f"launch {number}")
        if number in self.breaks_at_launch:
            raise RuntimeError("no launch")
        return Flight(self, number)


@dataclass
class Flight:
    device: Device
    number: int

    def outcomes(self) -> Sequence[RowOutcome]:
        self.device.log.append(f"wait {self.number}")
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

    def __post_init__(self) -> None:
        blocks = BlockPool(self.num_blocks, 4)
        prefixes, cache = ResidentPrefixes(blocks), PromptCache(blocks)
        scheduler = Scheduler(SchedulerLimits(8, 64, frozenset({EOS})), blocks, prefixes, cache)
        parts = EngineParts(
            scheduler, blocks, prefixes, cache, self.device, 1, overlapped=self.overlapped
        )
        self.core = EngineCore(parts, lambda _: None, lambda: 0.0, debug=True)

    def step(self, *messages: Any) -> None:
        for output in self.core.step(messages).outputs:
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
    engine.run()

    assert engine.device.log[:4] == ["launch 0", "wait 0", "call", "launch 1"]
    assert engine.tokens["a"] == [10, 11, 12]


@pytest.mark.parametrize("device", [Device(breaks_at_launch={1}), Device(breaks_later={1})])
def test_a_step_that_breaks_ends_its_requests_and_no_others(device: Device) -> None:
    engine = Engine(device=replace(device, log=[], plans=[]))
    engine.step(ask("a"))
    engine.step()
    engine.step(ask("b"))
    engine.run()

    assert engine.ended == {
        "a": (FinishReason.ERROR, STEP_FAILED),
        "b": (FinishReason.LENGTH, None),
    }
    assert engine.tokens["a"] == [10]
    assert len(engine.tokens["b"]) == 3
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
