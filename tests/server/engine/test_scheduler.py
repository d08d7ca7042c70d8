"""The policy, rule by rule, without a model: plans are looked at and answered by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

from server.engine.messages import (
    AbortRequest,
    AddRequest,
    EvictPrefix,
    FollowPin,
    Message,
    PinTask,
    PrefixFailed,
    PrefixReady,
    ReportDevice,
    RowOutcome,
    SchedulerOutput,
    SequenceOutput,
    UnpinTask,
    WarmPrefix,
)
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Sequence
from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.types import (
    DeviceReport,
    FinishReason,
    GenerationRequest,
    PinState,
    PrefixRef,
    PrefixTier,
    SamplingParams,
)

TOKEN, EOS = 5, 2


def ref(name: str, num_virtual_tokens: int = 4) -> PrefixRef:
    return PrefixRef(name, 1, f"sha256:{name}", num_virtual_tokens, num_virtual_tokens)


class Driver:
    """A scheduler and its step loop; every sampled token is `TOKEN` unless told otherwise."""

    def __init__(
        self,
        num_blocks: int = 100,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        pin_budget: float = 1.0,
        cached: bool = False,
    ) -> None:
        self.blocks = BlockPool(num_blocks, block_size)
        self.prefixes = ResidentPrefixes(self.blocks)
        limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens, frozenset({EOS}), pin_budget)
        self.prompt_cache = PromptCache(self.blocks, enabled=cached)
        self.scheduler = Scheduler(limits, self.blocks, self.prefixes, self.prompt_cache)
        self.inbox: list[Message] = []
        self.ended: dict[str, SequenceOutput] = {}
        self.now = 0.0

    def add(
        self,
        request_id: str,
        prompt: int = 3,
        prefix: PrefixRef | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        sampling = sampling or SamplingParams(max_tokens=50)
        self.inbox.append(
            AddRequest(GenerationRequest(request_id, (9,) * prompt, sampling, prefix), 7, self.now)
        )

    def step(self, *messages: Message, token: int = TOKEN) -> SchedulerOutput:
        plan = self.begin(*messages)
        self.end(plan, token)
        return plan

    def begin(self, *messages: Message) -> SchedulerOutput:
        """Up to the launch of a step; another may begin before it ends."""
        self.inbox += messages
        inbox, self.inbox = self.inbox, []
        plan = self.scheduler.schedule(self.now, inbox)
        self.now += 1
        self.take(self.scheduler.take_ended())
        self.scheduler.advance(plan)
        return plan

    def end(self, plan: SchedulerOutput, token: int = TOKEN) -> None:
        outcomes = [RowOutcome(token if row.sample else None) for row in plan.rows]
        self.take(self.scheduler.commit(plan, outcomes))
        self.scheduler.check_invariants()

    def take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self.ended[output.request_id] = output

    def make_resident(self, *refs: PrefixRef) -> None:
        self.step(*(WarmPrefix(r) for r in refs))
        self.step(*(PrefixReady(r.digest, PrefixTier.DISK) for r in refs))
        assert all(r.digest in self.prefixes for r in refs)


def ids(plan: SchedulerOutput) -> list[str]:
    return [row.sequence.request.request_id for row in plan.rows]


def sizes(plan: SchedulerOutput) -> list[tuple[str, int]]:
    return [(row.sequence.request.request_id, len(row.token_ids)) for row in plan.rows]


def test_decode_comes_before_prefill_and_prefill_takes_what_is_left() -> None:
    driver = Driver(max_num_batched_tokens=10)
    driver.add("long", prompt=25)
    driver.step()
    driver.add("short", prompt=2)
    assert sizes(driver.step()) == [("long", 10)]
    assert sizes(driver.step()) == [("long", 5), ("short", 2)]
    driver.add("other", prompt=25)

    assert sizes(driver.step()) == [("long", 1), ("short", 1), ("other", 8)]
    assert sizes(driver.step()) == [("long", 1), ("short", 1), ("other", 8)]


def test_a_step_never_exceeds_the_token_budget_nor_the_number_of_sequences() -> None:
    driver = Driver(max_num_seqs=3, max_num_batched_tokens=7)
    for i in range(6):
        driver.add(str(i), prompt=5)

    for plan in (driver.step() for _ in range(10)):
        assert plan.num_tokens <= 7
        assert len(plan.rows) <= 3


def test_sequences_are_admitted_first_come_first_served() -> None:
    driver = Driver(max_num_seqs=2)
    for name in "abcd":
        driver.add(name, sampling=SamplingParams(max_tokens=2))

    assert ids(driver.step()) == ["a", "b"]
    driver.step()
    assert ids(driver.step()) == ["c", "d"]


def test_a_cold_task_does_not_hold_up_a_hot_one() -> None:
    driver = Driver()
    hot, cold = ref("hot"), ref("cold")
    driver.make_resident(hot)
    driver.add("cold", prefix=cold)
    driver.add("hot", prefix=hot)
    plan = driver.step()

    assert ids(plan) == ["hot"]
    assert plan.prefix_requests == (cold,)
    assert driver.scheduler.num_waiting_for_prefix == 1


def test_a_prefix_is_asked_for_once_however_many_wait_for_it() -> None:
    driver = Driver()
    for i in range(5):
        driver.add(str(i), prefix=ref("a"))
    plans = [driver.step() for _ in range(3)]

    assert [len(plan.prefix_requests) for plan in plans] == [1, 0, 0]
    plan = driver.step(PrefixReady("sha256:a", PrefixTier.DISK))
    assert ids(plan) == list("01234")
    assert len(plan.prefix_loads) == 1
    assert len({row.prefix_block_ids for row in plan.rows}) == 1, "one copy, read by all"


def test_no_more_loads_are_under_way_than_sequences_can_run() -> None:
    driver = Driver(max_num_seqs=2)
    for name in "abcd":
        driver.add(name, prefix=ref(name))

    assert len(driver.step().prefix_requests) == 2
    plan = driver.step(PrefixFailed("sha256:a", "gone"))
    assert plan.prefix_requests == (ref("c"),)


def test_it_wakes_for_a_prefix_that_could_not_be_asked_for_until_now() -> None:
    """The only load under way was for an aborted request. Found by the simulation: the rest slept."""
    driver = Driver(max_num_seqs=1)
    driver.add("first", prefix=ref("a"))
    driver.add("second", prefix=ref("b"))
    driver.step()
    driver.step(AbortRequest("first"), PrefixReady("sha256:a", PrefixTier.DISK))

    assert driver.scheduler.has_work()
    assert driver.step().prefix_requests == (ref("b"),)
    assert not driver.scheduler.has_work(), "nothing to do until the load answers"


def test_one_that_finds_no_room_holds_up_those_behind_it() -> None:
    """Else small requests would overtake a large one for ever."""
    driver = Driver(num_blocks=9)
    driver.add("running", prompt=16)
    driver.step()
    driver.add("large", prompt=16)
    driver.add("small", prompt=1)

    assert ids(driver.step()) == ["running"]
    driver.step(AbortRequest("running"))
    assert "large" in ids(driver.step())


def test_a_newcomer_leaves_a_block_in_reserve_for_each_running_sequence() -> None:
    driver = Driver(num_blocks=4)
    driver.add("a", prompt=4)
    driver.step()
    driver.add("b", prompt=7)

    assert ids(driver.step()) == ["a"], "two blocks are free; b needs both and a will need one"
    driver.step(AbortRequest("a"))
    assert ids(driver.step()) == ["b"]


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    driver = Driver(num_blocks=13, max_num_batched_tokens=40)
    for name in "abc":
        driver.add(name, prompt=8, sampling=SamplingParams(max_tokens=24))
    seqs: dict[str, Sequence] = {}
    preempted: list[str] = []
    while len(driver.ended) < 3:
        plan = driver.step()
        seqs |= {row.sequence.request.request_id: row.sequence for row in plan.rows}
        preempted += [n for n, s in seqs.items() if s.status == "preempted"]

    assert preempted
    assert preempted[0] == "c"
    assert seqs["a"].num_preemptions == 0
    assert [o.finish_reason for o in driver.ended.values()] == [FinishReason.LENGTH] * 3


def test_a_preempted_sequence_goes_before_those_that_came_later() -> None:
    driver = Driver(num_blocks=9, max_num_batched_tokens=40)
    driver.add("a", prompt=12)
    driver.add("b", prompt=12)
    driver.add("later", prompt=12)
    plans: list[SchedulerOutput] = []
    while not any(plan.num_preemptions for plan in plans):
        plans.append(driver.step())
    driver.step(AbortRequest("a"))

    assert ids(driver.step())[0] == "b"


def test_a_preempted_sequence_computes_all_its_tokens_again() -> None:
    driver = Driver(num_blocks=9, max_num_batched_tokens=40)
    driver.add("a", prompt=12)
    driver.add("b", prompt=12)
    while not driver.step().num_preemptions:
        pass
    row = next(r for r in driver.step(AbortRequest("a")).rows)

    assert row.start == 0
    assert row.token_ids == (9,) * 12 + (TOKEN,) * (len(row.token_ids) - 12)
    assert len(row.token_ids) > 12
    assert row.sample


def test_an_idle_prefix_makes_room_before_a_sequence_is_preempted() -> None:
    driver = Driver(num_blocks=5)
    driver.make_resident(ref("idle"))
    driver.add("a", prompt=12, sampling=SamplingParams(max_tokens=4))
    plans = [driver.step() for _ in range(3)]

    assert [e.ref for e in driver.prefixes.take_evicted()] == [ref("idle")]
    assert sum(p.num_preemptions for p in plans) == 0


def test_a_failed_load_ends_only_those_who_wait_for_it() -> None:
    driver = Driver()
    driver.add("bad", prefix=ref("bad"))
    driver.add("other", prefix=ref("good"))
    driver.add("none")
    driver.step()
    plan = driver.step(
        PrefixFailed("sha256:bad", "no such blob"), PrefixReady("sha256:good", PrefixTier.HOST)
    )

    assert sorted(ids(plan)) == ["none", "other"]
    assert list(driver.ended) == ["bad"]
    assert driver.ended["bad"].error == "no such blob"


def test_choices_of_a_request_differ_in_seed_and_index_and_can_be_aborted_one_by_one() -> None:
    driver = Driver()
    driver.add("r", sampling=SamplingParams(n=3))
    plan = driver.step()
    assert [(row.sequence.index, row.sequence.seed) for row in plan.rows] == [
        (0, 7),
        (1, 8),
        (2, 9),
    ]
    plan = driver.step(AbortRequest("r", 1))

    assert [row.sequence.index for row in plan.rows] == [0, 2]
    assert driver.ended["r"].index == 1
    assert driver.ended["r"].finish_reason is FinishReason.ABORT


def test_eos_and_stop_tokens_end_a_sequence_but_not_before_min_tokens() -> None:
    cases = {
        SamplingParams(max_tokens=9): (EOS, 1, FinishReason.STOP),
        SamplingParams(max_tokens=9, min_tokens=3): (EOS, 4, FinishReason.STOP),
        SamplingParams(max_tokens=9, ignore_eos=True): (EOS, 9, FinishReason.LENGTH),
        SamplingParams(max_tokens=9, stop_token_ids=(8,)): (8, 1, FinishReason.STOP),
        SamplingParams(max_tokens=1): (EOS, 1, FinishReason.STOP),
    }
    for sampling, (token, count, reason) in cases.items():
        driver = Driver()
        driver.add("r", sampling=sampling)
        steps = next(n for n in itertools.count(1) if driver.step(token=token) and driver.ended)

        assert (steps, driver.ended["r"].finish_reason) == (count, reason), sampling
        assert driver.ended["r"].stop_token_id == (token if reason is FinishReason.STOP else None)


def test_a_request_that_pinned_prefixes_leave_no_room_for_is_refused_with_the_figures() -> None:
    driver = Driver(num_blocks=5)
    driver.step(PinTask(0, ref("pinned", 12)))
    driver.step(PrefixReady("sha256:pinned", PrefixTier.DISK))
    driver.add("r", prompt=8)
    driver.step()

    assert driver.ended["r"].finish_reason is FinishReason.ERROR
    assert driver.ended["r"].error == (
        "the request needs 2 KV blocks; the pool has 4, of which pinned prefixes hold 3"
    )


def test_a_refusal_does_not_leave_those_behind_it_asleep() -> None:
    driver = Driver(num_blocks=5)
    driver.step(PinTask(0, ref("pinned", 12)))
    driver.step(PrefixReady("sha256:pinned", PrefixTier.DISK))
    driver.add("large", prompt=8)
    driver.add("small", prompt=1)
    driver.step()

    assert "large" in driver.ended
    assert driver.scheduler.has_work()
    assert [row.sequence.request.request_id for row in driver.step().rows] == ["small"]


def test_prefixes_of_those_next_in_line_load_while_they_wait() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("running", prompt=4)
    driver.step()
    driver.add("next", prompt=4, prefix=ref("cold"))

    assert driver.step().prefix_requests == (ref("cold"),)


def test_warming_again_without_a_pin_does_not_lift_the_pin_that_was_asked_for() -> None:
    driver = Driver()
    driver.step(PinTask(0, ref("a")))
    driver.step(WarmPrefix(ref("a")))
    driver.step(PrefixReady("sha256:a", PrefixTier.DISK))

    assert driver.prefixes.entries()[0].pinned


def answer_to(driver: Driver, message: Message) -> object:
    [answer] = driver.step(message).answers
    return answer.value


def test_a_pin_ends_with_its_time_and_is_prolonged_by_another() -> None:
    driver = Driver(num_blocks=5)
    driver.step(PinTask(0, ref("a", 8), ttl_seconds=5))
    driver.step(PrefixReady("sha256:a", PrefixTier.DISK))
    driver.step(PinTask(0, ref("a", 8), ttl_seconds=5))
    driver.now = 6.9
    driver.add("r", prompt=12, sampling=SamplingParams(max_tokens=1))
    driver.step()
    assert "sha256:a" in driver.prefixes
    assert "2" in str(driver.ended["r"].error)
    driver.now = 7.1
    driver.add("s", prompt=12, sampling=SamplingParams(max_tokens=1))
    driver.step()
    assert driver.ended["s"].finish_reason is FinishReason.LENGTH
    assert "sha256:a" not in driver.prefixes


def test_pins_beyond_the_budget_are_refused_by_name_and_change_nothing() -> None:
    driver = Driver(num_blocks=11, pin_budget=0.5)
    assert answer_to(driver, PinTask(1, ref("a", 12))) == PinState(None, 3, 5)
    refused = answer_to(driver, PinTask(2, ref("b", 12)))
    assert refused == PinState(
        "with task 'b' pinned prefixes would hold 6 of the pool's 10 KV blocks; the budget is 5 "
        "(pin_budget)",
        3,
        5,
    )
    twin = replace(ref("twin"), digest="sha256:a", num_virtual_tokens=12)
    assert answer_to(driver, PinTask(3, twin)) == PinState(None, 3, 5)
    driver.step(UnpinTask("a"))
    driver.step(PrefixReady("sha256:a", PrefixTier.DISK))
    assert driver.prefixes.entries()[0].pinned
    driver.step(UnpinTask("twin"), UnpinTask("nobody"))
    assert not driver.prefixes.entries()[0].pinned
    assert answer_to(driver, PinTask(4, ref("b", 12))) == PinState(None, 3, 5)


def test_a_pin_follows_its_task_to_the_new_version_unless_that_is_too_large() -> None:
    driver = Driver(num_blocks=11, pin_budget=0.5)
    driver.step(PinTask(1, ref("a", 12), ttl_seconds=60))
    driver.step(PrefixReady("sha256:a", PrefixTier.DISK))
    second = replace(ref("a", 16), digest="sha256:second")
    assert answer_to(driver, FollowPin(2, second)) == PinState(None, 4, 5)
    driver.step(PrefixReady("sha256:second", PrefixTier.DISK))
    report = answer_to(driver, ReportDevice(3))
    assert isinstance(report, DeviceReport)
    pins = {r.ref.digest: (r.pinned, r.pin_seconds_left) for r in report.residents}
    assert pins == {"sha256:a": (False, None), "sha256:second": (True, 56.0)}
    assert (report.num_blocks, report.num_blocks_used, report.num_pinned_blocks) == (10, 7, 4)
    assert answer_to(driver, FollowPin(4, ref("nobody"))) is None
    third = replace(ref("a", 40), digest="sha256:third")
    given_up = answer_to(driver, FollowPin(5, third))
    assert isinstance(given_up, PinState)
    assert given_up.refusal is not None
    assert (given_up.num_pinned_blocks, driver.prefixes.num_evictable_blocks) == (4, 7)


def test_evicting_cancels_a_warming_under_way_and_its_answer_is_dropped() -> None:
    driver = Driver()
    driver.step(PinTask(0, ref("a")))
    driver.step(EvictPrefix("sha256:a"))
    driver.step(PrefixReady("sha256:a", PrefixTier.DISK))

    assert not driver.scheduler.staged
    assert len(driver.prefixes) == 0


def test_a_failed_step_ends_its_rows_and_does_not_trust_its_prefixes() -> None:
    driver = Driver()
    driver.make_resident(ref("old"))
    driver.add("old", prefix=ref("old"))
    driver.add("new", prefix=ref("new"))
    driver.add("far", prefix=ref("far"))
    driver.step()
    plan = driver.begin(PrefixReady("sha256:new", PrefixTier.DISK))
    assert sorted(ids(plan)) == ["new", "old"]
    driver.take(driver.scheduler.fail(plan, "broken"))
    driver.scheduler.check_invariants()

    assert {n: o.error for n, o in driver.ended.items()} == {"old": "broken", "new": "broken"}
    assert "sha256:old" in driver.prefixes
    assert "sha256:new" not in driver.prefixes
    assert ids(driver.step(PrefixReady("sha256:far", PrefixTier.DISK))) == ["far"]


def test_an_output_says_where_the_prefix_was_and_how_long_the_request_waited() -> None:
    driver = Driver()
    driver.make_resident(ref("hot"))
    one = SamplingParams(max_tokens=1)
    driver.add("cold", prefix=ref("cold"), sampling=one)
    driver.add("hot", prefix=ref("hot"), sampling=one)
    driver.add("none", sampling=one)
    driver.step()
    driver.step()
    driver.step(PrefixReady("sha256:cold", PrefixTier.DISK))

    seen = {n: (o.prefix_tier, o.queue_seconds) for n, o in driver.ended.items()}
    assert seen == {
        "cold": (PrefixTier.DISK, 2.0),
        "hot": (PrefixTier.DEVICE, 0.0),
        "none": (PrefixTier.NONE, 0.0),
    }


def test_the_same_messages_give_the_same_plans() -> None:
    def history() -> list[object]:
        driver = Driver(num_blocks=12)
        driver.make_resident(ref("a"))
        for i in range(6):
            driver.add(str(i), prompt=3 + i, prefix=ref("a"))
        return [
            [(r.token_ids, r.block_ids, r.prefix_block_ids) for r in driver.step().rows]
            for _ in range(40)
        ]

    assert history() == history()
