"""The rule of one standard error, against planted scores and a slow reading of its sentence."""

from __future__ import annotations

import itertools
import operator
import random
import statistics
from collections.abc import Callable

import pytest

from tests.trainer.sweep.sweeps import outcomes, setting
from trainer.sweep.pick import Outcome, Pick, Setting, pick, summarise


def picked(found: list[Outcome], by: str = "loss") -> Pick:
    chosen = pick(summarise(found), by)
    assert chosen is not None
    return chosen


def test_the_smallest_prefix_within_one_error_of_the_best_is_picked() -> None:
    """The best is P = 32 with 0.100 and an error of 0.010 over its seeds."""
    found = [
        *outcomes(setting(32), (0.08, 0.10, 0.12)),
        *outcomes(setting(8), (0.111, 0.111, 0.111)),
        *outcomes(setting(16), (0.105, 0.104, 0.106)),
        *outcomes(setting(4), (0.2, 0.2, 0.2)),
    ]

    chosen = picked(found)

    assert chosen.best.setting == setting(32)
    assert chosen.limit == pytest.approx(0.1 + 0.02 / 3**0.5)
    assert chosen.picked.setting == setting(8)
    assert "at most 0.1115 = 0.1000 + 0.0115" in chosen.rule
    assert "over seeds" in chosen.rule


def test_one_seed_is_judged_by_the_error_over_the_examples() -> None:
    found = [*outcomes(setting(16), (0.10,), error=0.02), *outcomes(setting(2), (0.119,))]

    chosen = picked(found)

    assert chosen.picked.setting == setting(2)
    assert "over examples" in chosen.rule
    found = [*outcomes(setting(16), (0.10,), error=0.01), *outcomes(setting(2), (0.119,))]
    assert picked(found).picked.setting == setting(16)


def test_of_equally_short_prefixes_the_best_is_picked_with_its_best_seed() -> None:
    found = [
        *outcomes(setting(4, "mlp"), (0.102, 0.104)),
        *outcomes(setting(4, "direct"), (0.107, 0.103)),
        *outcomes(setting(8), (0.09, 0.11)),
    ]

    chosen = picked(found)

    assert chosen.picked.setting == setting(4, "mlp")
    assert chosen.run.seed == 0


def test_of_a_generated_metric_more_is_better() -> None:
    found = [
        *outcomes(setting(1), (0.1, 0.1), accuracy=(80.0, 82.0)),
        *outcomes(setting(2), (0.9, 0.9), accuracy=(97.5, 97.5)),
        *outcomes(setting(9), (0.5, 0.5), accuracy=(97.0, 99.0)),
    ]

    chosen = picked(found, "accuracy")

    assert chosen.picked.setting == setting(2)
    assert chosen.limit == pytest.approx(97.0)
    assert "at least 97.0000 = 98.0000 - 1.0000" in chosen.rule
    assert picked(found, "loss").picked.setting == setting(1)


def test_a_setting_that_failed_with_one_seed_is_neither_picked_nor_the_best() -> None:
    found = [*outcomes(setting(2), (0.01, None)), *outcomes(setting(4), (0.2, 0.2))]

    chosen = picked(found)

    assert chosen.picked.setting == setting(4)
    assert chosen.best.setting == setting(4)
    assert summarise(found)[0].scores["loss"].value == 0.01, "what finished is shown"


def test_where_every_setting_failed_nothing_is_picked() -> None:
    assert pick(summarise(outcomes(setting(2), (None, 0.1))), "loss") is None
    assert pick([], "loss") is None


def test_an_error_that_is_no_number_lets_the_best_itself_be_picked() -> None:
    found = [*outcomes(setting(2), (0.3,)), *outcomes(setting(4), (0.2,), error=float("nan"))]
    assert picked(found).picked.setting == setting(4)


def oracle(found: list[Outcome], by: str) -> Setting | None:
    """The sentence of the rule, word for word, over all settings and lengths."""
    better: Callable[[float, float], bool] = operator.lt if by == "loss" else operator.gt
    means: dict[Setting, float] = {}
    errors: dict[Setting, float] = {}
    for one in {outcome.setting for outcome in found}:
        runs = [outcome for outcome in found if outcome.setting == one]
        if any(run.state != "finished" for run in runs):
            continue
        values = [run.scores[by].value for run in runs]
        means[one] = statistics.mean(values)
        errors[one] = (
            statistics.stdev(values) / len(values) ** 0.5
            if len(values) > 1
            else runs[0].scores[by].standard_error
        )
    if not means:
        return None
    best = next(
        one for one in means if not any(better(other, means[one]) for other in means.values())
    )
    for length in range(1, 100):
        near = [
            one
            for one in means
            if one.num_virtual_tokens == length
            and abs(means[one] - means[best]) <= errors[best] + 1e-12
        ]
        for one in near:
            if not any(better(means[other], means[one]) for other in near):
                return one
    raise AssertionError("the best is within one error of itself")


@pytest.mark.parametrize("seed", range(8))
def test_any_sweep_is_decided_as_the_sentence_says(seed: int) -> None:
    rng = random.Random(seed)
    chosen_shorter = 0
    for _ in range(50):
        num_seeds = rng.randint(1, 3)
        found: list[Outcome] = []
        for length, encoder in itertools.product((1, 2, 5, 20), ("direct", "mlp")):
            center = rng.choice((0.5, 0.52, 0.6))
            values = [rng.gauss(center, 0.03) for _ in range(num_seeds)]
            losses = [None if rng.random() < 0.05 else value for value in values]
            accuracy = [100 * (1 - value) for value in values]
            found += outcomes(setting(length, encoder), losses, error=0.03, accuracy=accuracy)
        rng.shuffle(found)
        for by in ("loss", "accuracy"):
            chosen, expected = pick(summarise(found), by), oracle(found, by)
            assert (chosen and chosen.picked.setting) == expected
            if chosen is not None and chosen.picked.setting != chosen.best.setting:
                chosen_shorter += 1
    assert chosen_shorter > 10, "the cases are hard enough to matter"


def test_means_and_errors_are_those_of_the_textbook() -> None:
    [summary] = summarise(outcomes(setting(3), (1.0, 2.0, 6.0)))
    assert summary.scores["loss"].value == 3.0
    assert summary.scores["loss"].standard_error == pytest.approx(7**0.5 / 3**0.5)
    assert summary.scores["loss"].over == "seeds"


def test_long_texts_are_told_short() -> None:
    text = setting(3, init="text", init_text="  Say  it\n in one sentence, please, and no more")
    assert text.start == "“Say it in one sentence,…”"
    assert setting(3, init="text", init_text="Short.").start == "“Short.”"
