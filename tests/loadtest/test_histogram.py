"""Percentiles of counted durations are those of the durations, to within half a per cent."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.histogram import LogHistogram


@pytest.mark.parametrize("count", [1, 2, 1_000, 20_001])
def test_percentiles_are_numpys_to_half_a_per_cent(count: int) -> None:
    values = np.random.default_rng(count).lognormal(-4, 1.5, count)
    histogram = LogHistogram()
    for value in values.tolist():
        histogram.add(value)

    for percent in (1, 50, 90, 99, 100):
        expected = np.percentile(values, percent, method="inverted_cdf")
        assert histogram.percentile(percent) == pytest.approx(expected, rel=0.005)


def test_the_curve_rises_to_one() -> None:
    histogram = LogHistogram()
    for value in (0.001, 0.002, 0.002, 0.1):
        histogram.add(value)

    seconds, shares = histogram.curve()

    assert seconds == pytest.approx([0.001, 0.002, 0.1], rel=0.005)
    assert shares == [0.25, 0.75, 1.0]


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e9])
def test_what_lies_outside_counts_as_the_nearest_inside(seconds: float) -> None:
    histogram = LogHistogram()
    histogram.add(seconds)

    assert histogram.total == 1
    assert histogram.percentile(50) == pytest.approx(1e-6 if seconds < 1 else 1e4, rel=0.01)


def test_without_durations_there_is_no_percentile() -> None:
    assert LogHistogram().percentile(50) is None
    assert LogHistogram().curve() == ([], [])
