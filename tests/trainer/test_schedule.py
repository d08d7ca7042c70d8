"""The learning rate rises to its peak, then falls as it was asked to."""

from __future__ import annotations

import math

import pytest

from trainer.schedule import Schedule, Shape


@pytest.mark.parametrize(
    ("shape", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)]
)
def test_it_rises_linearly_and_then_falls(shape: Shape, halfway: float, end: float) -> None:
    schedule = Schedule(1.0, num_steps=110, warmup_steps=10, shape=shape)

    rising = [schedule.learning_rate(step) for step in range(10)]
    assert rising == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert schedule.learning_rate(10) == 1.0
    assert schedule.learning_rate(60) == pytest.approx(halfway)
    assert schedule.learning_rate(110) == pytest.approx(end, abs=1e-12)


def test_a_quarter_of_the_way_the_cosine_has_fallen_less_than_the_line() -> None:
    cosine = Schedule(1.0, 100, 0, "cosine").learning_rate(25)

    assert cosine == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert cosine > Schedule(1.0, 100, 0, "linear").learning_rate(25)


def test_without_warm_up_it_begins_at_the_peak() -> None:
    assert Schedule(0.3, 1, 0, "linear").learning_rate(0) == 0.3
