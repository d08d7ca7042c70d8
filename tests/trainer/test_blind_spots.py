"""A metric that can not tell right from wrong says so, and decides nothing."""

from __future__ import annotations

import pytest

from trainer.blind_spots import about_references, require_sight
from trainer.errors import BadSetting
from trainer.metrics import METRICS, bleu, rouge_l, token_f1

SHORT = ["positive", "not at all", "yes."]
JAPANESE = ["はい", "いいえ"]


def test_bleu_of_short_references_is_zero_for_the_right_answer_and_more_for_a_wordy_one() -> None:
    """Why it must not decide: it is no mere zero."""
    assert bleu(["positive"], ["positive"]) == 0.0
    assert bleu(["it is positive I think"], ["positive"]) > 0.0


@pytest.mark.parametrize(
    ("metric", "references", "told"),
    [
        ("bleu", SHORT, "no reference has four words"),
        ("rouge_l", JAPANESE, "2 of 2 references have no letter a-z"),
        ("token_f1", ["A", "-", "!"], "of 3 of 3 references nothing is left"),
    ],
)
def test_a_metric_that_sees_no_reference_is_named_and_decides_nothing(
    metric: str, references: list[str], told: str
) -> None:
    (note,) = about_references([metric], references)
    assert told in note

    with pytest.raises(BadSetting, match=f"select_by: {metric} says nothing here"):
        require_sight(metric, references, "select_by")


@pytest.mark.parametrize("metric", METRICS)
def test_references_that_are_seen_are_not_remarked_on(metric: str) -> None:
    references = ["The cat sat on the mat.", "two words"]

    assert about_references([metric], references) == []
    require_sight(metric, references, "select_by")


def test_one_blind_reference_is_told_where_each_counts_by_itself() -> None:
    """A tenth of BLEU's references may be short; a label 'A' is wrong or right by itself."""
    assert "1 of 3" in about_references(["token_f1"], ["A", "B", "C"])[0]
    assert "1 of 2" in about_references(["rouge_l"], ["はい", "yes"])[0]
    require_sight("token_f1", ["A", "B", "C"], "pick_by")
    assert token_f1(["the"], ["A"]) == 100.0
    assert rouge_l(["はい"], ["はい"]) == 0.0


def test_what_is_no_metric_of_texts_is_not_judged() -> None:
    require_sight("loss", [""], "select_by")
    assert about_references(["exact_match"], ["A"]) == []
