"""The loss of each held-out example, and of all of them."""

from __future__ import annotations

import pytest

from tests.trainer.runs import random_examples, random_prefix, tiny_base
from trainer.held_out_loss import mean_loss, nats_by_example
from trainer.loss import next_token_loss
from trainer.metrics import loss, totals


def test_each_example_has_its_own_nats_however_they_are_batched() -> None:
    base = tiny_base()
    prefix, examples = random_prefix(base, 3), random_examples(11)

    together = nats_by_example(base, prefix, examples, rows=4)

    for example, (nats, count) in zip(examples, together, strict=True):
        assert count == len(example.completion_token_ids)
        alone = mean_loss(base, prefix, [example], 1, next_token_loss)
        assert nats / count == pytest.approx(alone, abs=1e-5)


def test_their_totals_are_the_mean_loss() -> None:
    base = tiny_base("gpt2")
    prefix, examples = random_prefix(base, 3), random_examples(9, seed=1)
    of_all = mean_loss(base, prefix, examples, 4, next_token_loss)
    rows = nats_by_example(base, prefix, examples, rows=4)
    assert loss(totals(rows)) == pytest.approx(of_all, abs=1e-6)
