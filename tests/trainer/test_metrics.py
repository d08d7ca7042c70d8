"""Known answers of every metric, and that sums over examples lose nothing."""

from __future__ import annotations

import importlib
import math
import random

import pytest
import sacrebleu

from trainer.errors import TrainerError
from trainer.metrics import (
    METRICS,
    accuracy,
    bleu,
    exact_match,
    loss,
    normalised,
    perplexity,
    require_known,
    rouge_l,
    token_f1,
)

WORDS = ["the", "a", "cat", "sat", "on", "mat", "Mat.", "red", "hat", "7", "lay,", "down"]


def random_texts(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def test_exact_match_forgives_white_space_in_front_and_nothing_else() -> None:
    predictions = [" a b", "a b", "\n a b", "a b ", "A b"]
    assert exact_match(predictions, ["a b"] * 5) == 60.0
    assert exact_match(["a b"], [" a b"]) == 100.0


def test_a_label_is_the_completion_without_the_white_space_around_it() -> None:
    assert accuracy([" yes\n", "no", "yes please", "Yes"], ["yes", "no", "yes", "yes"]) == 50.0


def test_squad_normalisation_drops_case_punctuation_and_articles() -> None:
    assert normalised("  The quick,  brown-fox; an A b!") == "quick brownfox b"


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("the cat sat", "A cat sat!", 100.0),
        ("cat cat", "cat", 100 * 2 / 3),  # one of two is right, all of one is found
        ("cat sat down", "cat lay", 40.0),  # precision 1/3, recall 1/2
        ("dog", "cat", 0.0),
        ("the", "", 100.0),  # nothing is left of either
        ("the", "cat", 0.0),
    ],
)
def test_token_f1_is_that_of_squad(prediction: str, reference: str, f1: float) -> None:
    assert token_f1([prediction], [reference]) == pytest.approx(f1)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # The LCS is "the cat was under the bed": 6 of 7 words predicted, 6 of 6 wanted.
    predicted, wanted = "The cat was found under the bed.", "the cat was under the bed"
    assert rouge_l([predicted, "dog"], [wanted, "cat"]) == pytest.approx(100 * (12 / 13) / 2)


def test_bleu_of_a_known_pair() -> None:
    """4/5, 3/4, 2/3 and 1/2 of the n-grams match; lengths are equal."""
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_bleu_summed_over_examples_is_that_of_the_corpus(seed: int) -> None:
    predictions, references = random_texts(seed), random_texts(seed + 100)
    corpus = sacrebleu.corpus_bleu(predictions, [references]).score
    assert bleu(predictions, references) == pytest.approx(corpus, abs=1e-9)
    assert 0 < corpus < 100


def test_loss_is_a_mean_over_tokens_and_not_over_examples() -> None:
    assert loss([6.0, 4.0]) == 1.5
    assert perplexity([6.0, 4.0]) == pytest.approx(math.exp(1.5))


def test_a_perplexity_that_can_not_be_written_down_is_infinite() -> None:
    assert perplexity([10_000.0, 1.0]) == math.inf


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_full_for_the_references_themselves(name: str) -> None:
    texts = random_texts(1)
    assert METRICS[name](texts, texts) == pytest.approx(100.0)


def test_more_predictions_than_references_are_our_own_bug() -> None:
    with pytest.raises(ValueError, match="shorter"):
        exact_match(["a", "b"], ["a"])


def test_a_library_that_is_missing_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(TrainerError, match=r"bleu needs sacrebleu.*prefixd\[train\]"):
        bleu(["a"], ["a"])


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TrainerError, match=r"'blue': expected one of exact_match, .*rouge_l"):
        require_known(["bleu", "blue"])
