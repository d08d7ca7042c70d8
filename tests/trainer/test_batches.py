"""Batches hold what is predicted from what, and every epoch holds every example once."""

from __future__ import annotations

from collections import Counter

import torch

from tests.trainer.runs import random_examples
from trainer.batches import DataOrder, make_batch

CPU = torch.device("cpu")


def test_each_target_is_the_token_behind_the_one_that_predicts_it() -> None:
    examples = random_examples(7)

    batch = make_batch(examples, CPU)

    found: list[list[int]] = [[] for _ in examples]
    for row, column, target in zip(
        batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True
    ):
        example = examples[row]
        tokens = (*example.prompt_token_ids, *example.completion_token_ids)
        assert tokens[column + 1] == target
        assert batch.token_ids[row, column] == tokens[column]
        found[row].append(target)
    assert [tuple(row) for row in found] == [e.completion_token_ids for e in examples]


def test_rows_are_padded_on_the_right_and_the_last_token_is_not_fed() -> None:
    examples = random_examples(7)

    batch = make_batch(examples, CPU)

    for row, example in zip(batch.token_ids.tolist(), examples, strict=True):
        fed = [*example.prompt_token_ids, *example.completion_token_ids[:-1]]
        assert row[: len(fed)] == fed
        assert not any(row[len(fed) :])
    assert batch.token_ids.shape[1] == max(e.num_tokens - 1 for e in examples)
    assert batch.num_tokens == sum(e.num_tokens - 1 for e in examples)


def test_an_epoch_holds_every_example_once_in_another_order_each_time() -> None:
    lengths = [5 + index % 13 for index in range(103)]
    order = DataOrder(lengths, 8, seed=1)
    epochs = [
        [order.indices(step) for step in range(start, start + order.steps_per_epoch)]
        for start in (0, order.steps_per_epoch)
    ]

    assert order.steps_per_epoch == 13
    for epoch in epochs:
        assert Counter(index for batch in epoch for index in batch) == Counter(range(103))
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_seed_and_step_alone() -> None:
    lengths = [5 + index % 13 for index in range(50)]
    forwards = DataOrder(lengths, 8, seed=1)
    expected = [forwards.indices(step) for step in range(30)]

    backwards = DataOrder(lengths, 8, seed=1)
    assert [backwards.indices(step) for step in reversed(range(30))] == expected[::-1]
    other = DataOrder(lengths, 8, seed=2)
    assert [other.indices(step) for step in range(30)] != expected


def test_examples_of_like_length_are_together() -> None:
    lengths = [1 + index % 100 for index in range(800)]
    order = DataOrder(lengths, 10, seed=0)

    spread = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in (order.indices(step) for step in range(order.steps_per_epoch))
    ]

    assert sum(spread) / len(spread) < 40, "at random it would be about 80"
