"""What the scheduler does with the prompt cache, rule by rule, without a model."""

from __future__ import annotations

from server.engine.messages import AddRequest, RowOutcome, ScheduledRow, SchedulerOutput
from server.types import FinishReason, GenerationRequest, PrefixRef, SamplingParams
from tests.server.engine.test_scheduler import Driver, ids, ref, sizes

SYSTEM = tuple(range(100, 116))  # 4 blocks


class CachedDriver(Driver):
    """A driver with the cache on, for prompts that are told apart."""

    def __init__(
        self, num_blocks: int = 100, max_num_seqs: int = 8, max_num_batched_tokens: int = 64
    ) -> None:
        super().__init__(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            cached=True,
        )

    def ask(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        prefix: PrefixRef | None = None,
        *,
        max_tokens: int = 1,
        n: int = 1,
        salt: str = "",
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        request = GenerationRequest(request_id, prompt, sampling, prefix, cache_salt=salt)
        self.inbox.append(AddRequest(request, 7, self.now))

    def answer(self, request_id: str, prompt: tuple[int, ...], salt: str = "") -> ScheduledRow:
        """The only row of the step in which a request of one token is answered."""
        self.ask(request_id, prompt, salt=salt)
        [row] = self.step().rows
        return row


def test_a_beginning_that_was_computed_is_not_computed_again() -> None:
    driver = CachedDriver()
    first = driver.answer("a", (*SYSTEM, 1, 2))
    second = driver.answer("b", (*SYSTEM, 3, 4, 5))

    assert (second.start, second.token_ids) == (16, (3, 4, 5))
    assert second.block_ids[:4] == first.block_ids[:4]
    assert driver.ended["b"].num_cached_tokens == 16
    assert driver.prompt_cache.take_counts() == (18 + 19, 16)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    """A prompt that ends on a block's end and is cached as a whole: its last block is computed again, in its own."""
    driver = CachedDriver()
    driver.answer("a", SYSTEM)
    row = driver.answer("b", SYSTEM)

    assert (row.start, row.token_ids) == (12, SYSTEM[12:])
    assert driver.prompt_cache.num_blocks == 4, "the block that was computed twice is kept once"
    assert driver.blocks.num_used == 4


def test_a_prompt_one_longer_than_what_is_cached_computes_one_token() -> None:
    driver = CachedDriver()
    driver.answer("a", SYSTEM)

    assert driver.answer("b", (*SYSTEM, 1)).token_ids == (1,)


def test_another_salt_or_prefix_finds_nothing() -> None:
    driver = CachedDriver()
    driver.make_resident(ref("p"), ref("q"))
    driver.answer("a", (*SYSTEM, 1))
    driver.ask("b", (*SYSTEM, 1), ref("p"))
    driver.step()

    assert driver.answer("c", (*SYSTEM, 1), salt="x").start == 0
    driver.ask("d", (*SYSTEM, 1), ref("q"))
    driver.ask("e", (*SYSTEM, 1), ref("p"))
    assert [row.start for row in driver.step().rows] == [0, 16]


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    driver = CachedDriver()
    driver.ask("a", SYSTEM[:6], max_tokens=7)
    for _ in range(7):
        driver.step()
    assert driver.ended["a"].finish_reason is FinishReason.LENGTH

    # 6 + 7 tokens, the last of which was never computed: three full blocks
    assert driver.answer("b", (*SYSTEM[:6], *[5] * 7, 1)).start == 12


def test_cached_tokens_cost_nothing_of_the_budget() -> None:
    driver = CachedDriver(max_num_batched_tokens=17)
    driver.answer("a", (*SYSTEM, 1))
    driver.ask("b", (*SYSTEM, 2), max_tokens=9)
    driver.ask("c", (*SYSTEM, 3), max_tokens=9)

    assert sizes(driver.step()) == [("b", 1), ("c", 1)]


def test_choices_of_one_request_wait_for_the_first_to_compute_their_prompt() -> None:
    driver = CachedDriver()
    driver.ask("a", (*SYSTEM, 1), n=3, max_tokens=3)
    driver.ask("b", (9, 9, 9))
    assert sizes(driver.step()) == [("a", 17), ("b", 3)], "nobody else is held up"
    assert sizes(driver.step()) == [("a", 1), ("a", 1), ("a", 1)]
    assert driver.blocks.num_used == 4 + 3, "the prompt is held once"


def test_those_who_wait_for_a_row_that_fails_compute_for_themselves() -> None:
    driver = CachedDriver()
    driver.ask("a", (*SYSTEM, 1))
    driver.ask("b", (*SYSTEM, 2))
    plan = driver.begin()
    assert ids(plan) == ["a"]
    driver.take(driver.scheduler.fail(plan, "boom"))

    assert sizes(driver.step()) == [("b", 18 - 1)]


def test_a_long_prompt_goes_on_from_what_another_has_computed_meanwhile() -> None:
    """Both began before anything was cached."""
    driver = CachedDriver(max_num_batched_tokens=20)
    driver.ask("a", (*SYSTEM, 1))
    driver.ask("b", (7, 7, 7, 7, *SYSTEM, 2))
    driver.step()  # a: 17; b: 3 of its first block
    driver.ask("c", (7, 7, 7, 7, *SYSTEM[:4], 3))
    rows = {row.sequence.request.request_id: row for row in driver.step().rows}
    assert rows["b"].start == 3
    assert "c" not in rows, "b is computing its first block"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    driver = CachedDriver(num_blocks=1 + 10)
    driver.ask("old", tuple(range(20)), max_tokens=4)
    driver.ask("young", tuple(range(50, 66)), max_tokens=50)
    num_preemptions = 0
    while not num_preemptions:
        num_preemptions += driver.step().num_preemptions
    again: list[ScheduledRow] = []
    while not again:
        plan: SchedulerOutput = driver.step()
        again = [r for r in plan.rows if r.sequence.request.request_id == "young"]

    assert again[0].sequence.num_preemptions == 1
    assert again[0].start == 16
    assert again[0].sequence.num_cached_tokens == 0, "that is no hit of a prompt"


def test_cached_blocks_count_as_room_and_are_evicted_for_it() -> None:
    driver = CachedDriver(num_blocks=1 + 5)
    driver.answer("a", SYSTEM)
    assert driver.prompt_cache.num_evictable_blocks == 4
    row = driver.answer("b", tuple(range(18)))

    assert len(row.block_ids) == 5
    assert driver.ended["b"].finish_reason is FinishReason.LENGTH


def test_a_failed_row_takes_what_it_read_out_of_the_cache() -> None:
    driver = CachedDriver()
    driver.answer("a", (*SYSTEM, 1))
    driver.ask("b", (*SYSTEM, 2))
    plan = driver.begin()
    driver.scheduler.commit(plan, [RowOutcome(error="not finite")])
    driver.scheduler.check_invariants()

    assert driver.blocks.num_used == 0
    assert driver.answer("c", (*SYSTEM, 3)).start == 0


def test_a_chunk_that_gave_no_logits_yet_is_not_shared() -> None:
    """Nothing has proved it finite."""
    driver = CachedDriver(max_num_batched_tokens=8)
    driver.ask("a", (*SYSTEM, 1), max_tokens=5)
    driver.step()
    assert driver.prompt_cache.num_blocks == 0
    driver.step()
    driver.step()
    assert driver.prompt_cache.num_blocks == 4
