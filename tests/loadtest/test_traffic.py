"""The traffic is what the theory says of it, and the same whenever it is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loadtest.errors import BadLoad
from loadtest.traffic import Shape, make_traffic, popularity

SHAPE = Shape(
    rate=100.0,
    burstiness=1.0,
    zipf=1.0,
    input_len=(8, 512),
    output_len=(8, 64),
    warmup_seconds=100.0,
    duration_seconds=900.0,
    seed=7,
)
"""About 100,000 requests: bounds below are five standard errors wide."""


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_coefficient_of_variation_asked_for(burstiness: float) -> None:
    at = make_traffic(replace(SHAPE, burstiness=burstiness), 1).at
    gaps = np.diff(at, prepend=0.0)

    assert len(at) == pytest.approx(100_000, abs=5 * burstiness * 100_000**0.5)
    # The variance of a sample's variance grows with the fourth moment, 3 + 6 cv² for gamma gaps.
    spread = (
        5 * ((2 + 6 * burstiness**2) / len(gaps)) ** 0.5 / 2 + 5 * burstiness / len(gaps) ** 0.5
    )
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=spread)


def test_arrivals_at_a_burstiness_of_one_are_those_of_poisson() -> None:
    at = make_traffic(SHAPE, 1).at
    counts = np.bincount(at.astype(int), minlength=1000)

    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=5 * (2 / 1000) ** 0.5)
    beyond_mean = float(np.mean(np.diff(at) > 1 / 100))
    assert beyond_mean == pytest.approx(np.exp(-1), abs=5 * 0.48 / len(at) ** 0.5)


def test_arrivals_are_in_order_and_end_with_the_duration() -> None:
    at = make_traffic(SHAPE, 1).at

    assert (np.diff(at) >= 0).all()
    assert 0 < at[0] < at[-1] < SHAPE.total_seconds


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
def test_tasks_get_their_share_by_the_power_law(exponent: float) -> None:
    traffic = make_traffic(replace(SHAPE, zipf=exponent), 50)
    got = np.bincount(traffic.task, minlength=50) / len(traffic)
    ranks = np.arange(1, 51)
    expected = ranks**-exponent / np.sum(ranks**-exponent)

    assert np.abs(got - expected).max() < 5 * (0.25 / len(traffic)) ** 0.5
    assert popularity(50, exponent) == pytest.approx(expected)


def test_lengths_are_uniform_with_both_ends() -> None:
    traffic = make_traffic(SHAPE, 5)

    for lengths, (low, high) in (
        (traffic.input_len, SHAPE.input_len),
        (traffic.output_len, SHAPE.output_len),
    ):
        assert (lengths.min(), lengths.max()) == (low, high)
        width = high - low + 1
        error = 5 * (width / 12**0.5) / len(lengths) ** 0.5
        assert lengths.mean() == pytest.approx((low + high) / 2, abs=error)
        assert lengths.std() == pytest.approx(((width**2 - 1) / 12) ** 0.5, rel=0.02)


SHORT = replace(SHAPE, warmup_seconds=0.0, duration_seconds=5.0)


def test_the_same_seed_is_the_same_traffic_and_another_is_not() -> None:
    one, again, other = (
        make_traffic(replace(SHORT, seed=seed), 20) for seed in (SHORT.seed, SHORT.seed, 8)
    )

    for name in ("at", "task", "input_len", "output_len"):
        assert (getattr(one, name) == getattr(again, name)).all()
        count = min(len(one), len(other))
        assert (getattr(one, name)[:count] != getattr(other, name)[:count]).any()
    assert one.prompt(3, 1000) == again.prompt(3, 1000)
    assert one.prompt(3, 1000) != other.prompt(3, 1000)


def test_runs_over_other_numbers_of_tasks_differ_in_the_tasks_alone() -> None:
    few, many = make_traffic(SHORT, 5), make_traffic(SHORT, 1000)

    assert (few.at == many.at).all()
    assert (few.input_len == many.input_len).all()
    assert (few.output_len == many.output_len).all()
    assert few.prompt(9, 1000) == many.prompt(9, 1000)
    assert few.task.max() == 4
    assert many.task.max() > 100


def test_a_prompt_is_as_long_as_drawn_and_of_ids_that_exist() -> None:
    traffic = make_traffic(SHORT, 5)
    prompts = [traffic.prompt(index, 30) for index in range(20)]

    assert [len(prompt) for prompt in prompts] == traffic.input_len[:20].tolist()
    ids = {token for prompt in prompts for token in prompt}
    assert ids == set(range(30))


def test_the_bare_base_has_one_name_only() -> None:
    assert set(make_traffic(SHORT, 0).task.tolist()) == {0}


def test_no_traffic_and_too_much_of_it_are_refused() -> None:
    with pytest.raises(BadLoad, match="no request arrives"):
        make_traffic(replace(SHORT, rate=1e-6), 1)
    with pytest.raises(BadLoad, match="at most 5,000,000"):
        make_traffic(replace(SHORT, rate=1e7), 1)
