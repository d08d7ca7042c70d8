"""Standard errors against what theory gives."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from trainer.metrics import METRICS, Rows, perplexity
from trainer.standard_error import difference, score


def mean(sums: Sequence[float]) -> float:
    return sums[0] / sums[1]


def drawn(seed: int, count: int) -> Rows:
    rng = random.Random(seed)
    return [(rng.gauss(5.0, 2.0), 1.0) for _ in range(count)]


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_count() -> None:
    found = score(drawn(0, 400), mean)
    assert found.value == pytest.approx(5.0, abs=0.3)
    assert found.standard_error == pytest.approx(2.0 / 20, rel=0.1)


def test_a_share_has_the_textbook_error() -> None:
    value = METRICS["exact_match"].value
    rows: Rows = [(float(i < 240), 1.0) for i in range(400)]
    found = score(rows, value, yes_or_no=True)
    assert found.value == 60.0
    assert found.standard_error == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 400), rel=0.02)


def test_all_of_many_is_no_certainty() -> None:
    found = score([(1.0, 1.0)] * 500, METRICS["accuracy"].value, yes_or_no=True)
    assert found.value == 100.0
    assert 0.1 < found.standard_error < 0.5


def test_what_two_share_does_not_blur_their_difference() -> None:
    """Scores vary by 2 from example to example, and yet every example gains exactly 0.5."""
    rows = drawn(1, 100)
    better: Rows = [(value + 0.5, 1.0) for value, _ in rows]
    found = difference(better, rows, mean)
    assert found.value == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)
    assert score(rows, mean).standard_error > 0.1


def test_the_error_of_bleu_is_near_that_of_sacrebleu() -> None:
    import sacrebleu

    rng = random.Random(2)
    words = ["the", "cat", "sat", "on", "a", "mat", "with", "one", "red", "hat"]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(200)]
    other = [" ".join(w if rng.random() < 0.7 else "dog" for w in t.split()) for t in texts]
    found = score(METRICS["bleu"].rows(other, texts), METRICS["bleu"].value)
    scorer = sacrebleu.metrics.BLEU()  # type: ignore[attr-defined]
    theirs = scorer.corpus_score(other, [texts], n_bootstrap=1000)
    assert found.value == pytest.approx(theirs.score)
    assert 1.96 * found.standard_error == pytest.approx(theirs._ci, rel=0.15)


def test_the_same_rows_give_the_same_error() -> None:
    assert score(drawn(3, 50), mean) == score(drawn(3, 50), mean)


def test_an_infinite_score_has_no_error() -> None:
    found = score([(10_000.0, 1.0), (0.1, 1.0)], perplexity)
    assert found.value == math.inf
    assert math.isnan(found.standard_error)
