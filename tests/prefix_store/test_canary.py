"""A canary's share: the stated one, the same side for the same user, and only growing with the weight."""

from __future__ import annotations

import pytest

from prefix_store.canary import takes_canary

KEYS = [f"user-{number}" for number in range(4000)]


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_share_is_the_weight(weight: float) -> None:
    share = sum(takes_canary("task", 4, weight, key) for key in KEYS) / len(KEYS)
    assert share == pytest.approx(weight, abs=0.02)
    if weight in (0.0, 1.0):
        assert share == weight


def test_a_larger_weight_keeps_whom_the_smaller_one_took() -> None:
    small, large = ({k for k in KEYS if takes_canary("task", 4, w, k)} for w in (0.1, 0.3))
    assert small < large


def test_another_canary_or_task_draws_others() -> None:
    drawn = [
        {k for k in KEYS if takes_canary(task, version, 0.2, k)}
        for task, version in (("task", 4), ("task", 5), ("other", 4))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = len(drawn[one] & drawn[other]) / len(KEYS)
        assert both == pytest.approx(0.04, abs=0.015)


def test_a_key_may_hold_any_text() -> None:
    assert isinstance(takes_canary("task", 1, 0.5, "\ud800 \0 ö"), bool)
