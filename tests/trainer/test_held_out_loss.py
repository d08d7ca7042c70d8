"""The loss of each held-out example, and of all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from tests.trainer.runs import random_examples, random_prefix, tiny_base
from trainer.encoding import EncodedExample
from trainer.held_out_loss import gap_error, mean_loss, nats_by_example, with_other_prompts
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


def test_a_long_prompt_before_a_long_completion_still_fits_the_model() -> None:
    """A model with learned positions has no vector for one beyond its last."""
    base = tiny_base("gpt2", n_positions=24)
    prefix = random_prefix(base, 3)
    long_prompt = EncodedExample(tuple(range(10, 28)), (5, 6), "")
    long_completion = EncodedExample((40, 41), tuple(range(50, 68)), "")

    swapped = with_other_prompts([long_prompt, long_completion], room=24 - 3)

    assert swapped[0] == EncodedExample((40, 41), (5, 6), "")
    assert swapped[1] == EncodedExample((25, 26, 27), long_completion.completion_token_ids, "")
    assert mean_loss(base, prefix, swapped, 2, next_token_loss) > 0


def test_prompts_of_other_examples_are_whole_where_there_is_room() -> None:
    examples = random_examples(6)
    longest = EncodedExample(tuple(range(3, 13)), tuple(range(3, 13)), "")

    swapped = with_other_prompts([*examples, longest], room=40)

    assert swapped == with_other_prompts([*examples, longest], room=None)
    assert [e.prompt_token_ids for e in swapped] == [
        e.prompt_token_ids for e in [*examples[1:], longest, examples[0]]
    ]
    assert [e.completion_token_ids for e in swapped[:-1]] == [
        e.completion_token_ids for e in examples
    ]


def test_the_error_of_the_gap_is_small_where_all_examples_agree_and_large_where_chance_rules() -> (
    None
):
    examples = random_examples(40, seed=2)
    other = {id(example): number for number, example in enumerate(examples)}
    others = [replace(example, reference="other") for example in examples]

    def loss_of(noise: float) -> Callable[[Sequence[EncodedExample]], float]:
        drawn = random.Random(1)
        offsets = [drawn.gauss(0.0, noise) for _ in examples]

        def mean(chosen: Sequence[EncodedExample]) -> float:
            return sum(
                1.0 if id(e) in other else 3.0 + offsets[others.index(e)] for e in chosen
            ) / len(chosen)

        return mean

    assert gap_error(loss_of(0.0), examples, others) == pytest.approx(0.0, abs=1e-9)
    assert gap_error(loss_of(1.0), examples, others) == pytest.approx(1.0 / 40**0.5, rel=0.5)
    assert gap_error(loss_of(1.0), examples[:2], others[:2]) > 0
