"""Log-probabilities of the rows that ask: whose they are, and that they are finite numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from server.engine.messages import RowOutcome, ScheduledRow
from server.engine.sequence import Sequence
from server.model.logprobs import LEAST, RowLogprobs, step_logprobs
from server.model.runner import _Launched
from server.model.sampler import NUMERICAL_ERROR
from server.types import GenerationRequest, SamplingParams

V = 30


def row(
    *, told: tuple[int, ...] = (), sample: bool = True, logprobs: int | None = None, prompt: int = 0
) -> ScheduledRow:
    sampling = SamplingParams(logprobs=logprobs, prompt_logprobs=prompt if told else None)
    return ScheduledRow(
        sequence=Sequence(GenerationRequest("r", (1,), sampling), index=0, seed=0, arrival=0.0),
        token_ids=(0,) * max(len(told), 1),
        start=0,
        prefix_block_ids=(),
        num_virtual_tokens=0,
        first_position=0,
        block_ids=(1,),
        sample=sample,
        told_token_ids=told,
    )


def random_logits(rows: int) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0)) * 3


def told_of(rows: list[ScheduledRow], logits: Tensor, sampled: list[int]) -> list[RowLogprobs]:
    found = step_logprobs(rows, logits, torch.tensor(sampled, dtype=torch.int64))
    assert found is not None
    return found.of_rows()


def test_nothing_is_computed_if_nobody_asks() -> None:
    assert step_logprobs([row()], random_logits(1), torch.tensor([3])) is None


def test_each_row_is_told_of_its_own_tokens() -> None:
    """Logits: of the sampling rows in their order, then of the tokens to be told of in theirs."""
    rows = [
        row(logprobs=0),
        row(told=(4, 5), sample=False, prompt=2),
        row(),
        row(told=(6,), logprobs=3),
    ]
    logits = random_logits(6)  # of rows 0, 2 and 3, then of 4, 5 and 6
    expected = logits.log_softmax(-1)

    first, second, third, fourth = told_of(rows, logits, [9, 8, 7])

    assert first.sampled is not None
    assert (first.sampled.token_id, first.sampled.top, first.prompt) == (9, (), ())
    assert first.sampled.logprob == expected[0, 9]
    assert second.sampled is None
    assert [(e.token_id, e.logprob) for e in second.prompt] == [
        (4, float(expected[3, 4])),
        (5, float(expected[4, 5])),
    ]
    best = expected[3].topk(2)
    assert second.prompt[0].top == tuple(
        zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    assert third == RowLogprobs()
    assert fourth.sampled is not None
    assert (fourth.sampled.token_id, len(fourth.sampled.top)) == (7, 3)
    assert fourth.sampled.logprob == expected[2, 7]
    assert [(e.token_id, e.logprob, e.top) for e in fourth.prompt] == [
        (6, float(expected[5, 6]), ())
    ]


def test_the_most_probable_token_has_the_highest_value_to_the_bit() -> None:
    """lm-eval calls a token greedy if its value equals the greatest one."""
    logits = random_logits(40).bfloat16()
    best = logits.float().argmax(-1).tolist()

    for found in told_of([row(logprobs=1) for _ in best], logits, best):
        assert found.sampled is not None
        assert found.sampled.logprob == found.sampled.top[0][1]


def test_a_row_has_the_same_values_alone_and_among_others() -> None:
    logits = random_logits(9)
    together = told_of([row(logprobs=4)] * 9, logits, list(range(9)))

    for number in range(9):
        alone = told_of([row(logprobs=4)], logits[number : number + 1], [number])
        assert alone == [together[number]]


def test_no_value_is_one_that_json_lacks() -> None:
    logits = random_logits(1)
    logits[0, 5] = float("-inf")

    (found,) = told_of([row(told=(5,), logprobs=20, prompt=20)], logits.repeat(2, 1), [-1])

    assert found.sampled is not None
    entries = [found.sampled, *found.prompt]
    values = [value for e in entries for value in (e.logprob, *(v for _, v in e.top))]
    assert len(values) == 42
    assert all(math.isfinite(value) and value >= LEAST for value in values)
    assert found.prompt[0].logprob == LEAST


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [1, 2])
def test_a_row_with_a_token_that_has_no_number_has_failed_alone(value: float, place: int) -> None:
    """In the middle of a prompt nothing is sampled that would notice: a score would be made of it."""
    rows = [row(logprobs=2), row(told=(5, 6), sample=False, prompt=2), row(logprobs=0)]
    logits = random_logits(4)
    logits[place + 1, 7] = value

    first, broken, last = told_of(rows, logits, [3, 4])

    assert broken == RowLogprobs(finite=False)
    assert (first, last) == tuple(told_of([row(logprobs=2), row(logprobs=0)], logits[:2], [3, 4]))


def test_more_alternatives_than_there_are_tokens_are_all_of_them() -> None:
    (found,) = told_of([row(logprobs=20)], random_logits(1)[:, :3], [1])

    assert found.sampled is not None
    assert sorted(token for token, _ in found.sampled.top) == [0, 1, 2]


def test_the_outcome_of_such_a_row_is_an_error_though_it_samples_nothing() -> None:
    rows = (row(told=(5, 6), sample=False), row(logprobs=0))
    logits = random_logits(3)
    logits[2, 7] = float("nan")  # of the second token told of
    sampled = torch.tensor([4])

    broken, whole = _Launched(rows, sampled, step_logprobs(rows, logits, sampled)).outcomes()

    assert broken == RowOutcome(error=NUMERICAL_ERROR)
    assert (whole.token_id, whole.error) == (4, None)
