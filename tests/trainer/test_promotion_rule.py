"""The rule of a promotion: what it says, and that nothing else is read as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import TrainerError
from trainer.promotion_rule import BadRule, PromotionRule, parse_rule


@pytest.mark.parametrize(
    ("text", "metric", "comparison", "needs_live", "offset"),
    [
        ("bleu >= live + 0.5", "bleu", ">=", True, 0.5),
        ("bleu>=live+0.5", "bleu", ">=", True, 0.5),
        ("  rouge_l  >  live - .25 ", "rouge_l", ">", True, -0.25),
        ("exact_match > live", "exact_match", ">", True, 0.0),
        ("accuracy >= 95", "accuracy", ">=", False, 95.0),
        ("token_f1 < 12.50", "token_f1", "<", False, 12.5),
    ],
)
def test_a_rule_is_read_as_it_is_meant(
    text: str, metric: str, comparison: str, needs_live: bool, offset: float
) -> None:
    assert parse_rule(text) == PromotionRule(text, metric, comparison, needs_live, offset)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a metric (exact_match, .*) at character 1, got the end"),
        ("loss < 2", "expected a metric .* at character 1, got 'loss'"),
        ("bleu", "expected a comparison (>=, >, <=, <) at character 5, got the end"),
        ("bleu == live", "expected a comparison .* at character 6, got '=='"),
        ("bleu >= ", "expected a number or 'live' at character 9, got the end"),
        ("bleu >= alive", "expected a number or 'live' at character 9, got 'alive'"),
        ("bleu >= -1", "expected a number or 'live' at character 9, got '-'"),
        ("bleu >= nan", "expected a number or 'live' at character 9, got 'nan'"),
        ("bleu >= live * 2", "expected '+', '-' or the end at character 14, got '*'"),
        ("bleu >= live + ", "expected a number at character 16, got the end"),
        ("bleu >= live + live", "expected a number at character 16, got 'live'"),
        ("bleu >= 1e3", "expected the end at character 10, got 'e3'"),
        ("bleu >= live + 1 and 2", "expected the end at character 18, got 'and'"),
        ("__import__('os')", "expected a metric .* at character 1, got '__import__'"),
    ],
)
def test_anything_else_is_refused_with_what_was_expected_and_where(
    text: str, expected: str
) -> None:
    with pytest.raises(BadRule) as caught:
        parse_rule(text)
    for part in expected.split(".*"):
        assert part in str(caught.value)


@given(st.text(alphabet="bleu>=<live+-.0 5e_()'x", max_size=24) | st.text(max_size=40))
def test_any_text_is_a_rule_or_a_refusal(text: str) -> None:
    try:
        rule = parse_rule(text)
    except TrainerError:
        return
    assert rule.offset == rule.bound(0.0 if rule.needs_live else None)


@pytest.mark.parametrize(
    ("text", "candidate", "live", "holds"),
    [
        ("bleu >= live + 0.5", 97.0, 96.5, True),
        ("bleu >= live + 0.5", 96.9, 96.5, False),
        ("bleu >= live + 0.1", 0.1 + 0.2, 0.2, True),  # 0.30000000000000004 and 0.3
        ("bleu > live", 50.0, 50.0, False),
        ("bleu > live", 50.1, 50.0, True),
        ("bleu <= live - 1", 49.0, 50.0, True),
        ("bleu < 20", 20.0, None, False),
        ("bleu >= 20", 20.0, None, True),
        ("bleu >= live - 100", 100.0, None, False),
    ],
)
def test_a_rule_holds_or_not(text: str, candidate: float, live: float | None, holds: bool) -> None:
    assert parse_rule(text).holds(candidate, live) is holds
