"""How much of a prompt one step takes, when its log-probabilities are asked for and when not."""

from __future__ import annotations

import random

import pytest

from server.engine.messages import MAX_TOLD_TOKENS, ScheduledRow
from server.engine.sequence import Sequence
from server.engine.step_plan import StepPlan
from server.types import GenerationRequest, SamplingParams, TokenLogprob


def sequence(num_prompt_tokens: int, *, asks: bool = True) -> Sequence:
    sampling = SamplingParams(prompt_logprobs=0 if asks else None)
    request = GenerationRequest("r", tuple(range(100, 100 + num_prompt_tokens)), sampling)
    return Sequence(request, index=0, seed=0, arrival=0.0)


def entries(tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token, -1.0) for token in tokens)


def planned(step: StepPlan, seq: Sequence) -> ScheduledRow | None:
    step.add_row(seq)
    return step.rows.get(seq)


def test_a_prompt_of_which_nobody_asks_takes_the_whole_budget() -> None:
    row = planned(StepPlan(500), sequence(400, asks=False))

    assert row is not None
    assert (len(row.token_ids), row.sample, row.told_token_ids) == (400, True, ())


def test_the_budget_of_tokens_to_tell_of_is_shared_and_given_back() -> None:
    step = StepPlan(500)
    first, second, third = sequence(40), sequence(90), sequence(90)
    rows = [planned(step, seq) for seq in (first, second, third)]

    assert [None if row is None else len(row.token_ids) for row in rows] == [40, 25, None]
    assert rows[0] is not None
    assert rows[0].told_token_ids == tuple(range(101, 140)), "what follows each but the last"
    assert step.budget == 500 - 65
    step.take_back(first)
    row = planned(step, third)
    assert row is not None
    assert len(row.told_token_ids) == 39
    assert (step.budget, step.told_budget) == (500 - 25 - 39, 0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_on_the_way_each_token_is_told_once_and_in_order(seed: int) -> None:
    """Cut anywhere, started anew from anywhere that is told already, with a step under way while the next is planned."""
    rng = random.Random(seed)
    seq = sequence(rng.randint(1, 200))
    under_way: list[ScheduledRow] = []
    while seq.num_computed_tokens < seq.num_tokens or under_way:
        step = StepPlan(rng.randint(1, 100), told_budget=rng.randint(0, MAX_TOLD_TOKENS))
        row = planned(step, seq) if seq.num_uncomputed_tokens else None
        if row is not None:
            assert step.told_budget >= 0
            assert step.budget >= 0
            if row.told_token_ids:
                assert row.told_from >= row.start
                told_to = row.told_from + len(row.told_token_ids)
                assert told_to <= row.start + len(row.token_ids)
            seq.num_computed_tokens += len(row.token_ids)
            under_way.append(row)
        if under_way and rng.random() < 0.6:
            done = under_way.pop(0)
            seq.take_prompt_logprobs(done.told_from, entries(done.told_token_ids))
        if (
            rng.random() < 0.05
        ):  # preempted; what the cache then has may be read as far as it is told
            seq.num_computed_tokens = rng.randint(0, min(seq.num_told_tokens, seq.num_tokens - 1))

    told = [entry.token_id for entry in seq.prompt_logprobs]
    assert told == list(seq.request.prompt_token_ids[1:])


def test_the_cache_may_serve_what_is_told_and_then_everything() -> None:
    seq = sequence(10)
    assert seq.num_told_tokens == 0
    seq.take_prompt_logprobs(0, entries((101, 102, 103)))
    assert seq.num_told_tokens == 3
    seq.take_prompt_logprobs(1, entries((102, 103, 104, 105)))
    assert seq.num_told_tokens == 5
    seq.take_prompt_logprobs(5, entries(tuple(range(106, 110))))
    assert seq.num_told_tokens == seq.num_tokens
    assert sequence(1).num_told_tokens == 1
    assert sequence(10, asks=False).num_told_tokens == 10
