"""How far a score may be off for the examples that happened to be drawn. Pure and seeded; called by `evaluate`.

A bootstrap over examples: the examples are drawn anew, with replacement, and the score is computed of each
draw; the standard error is the standard deviation of these scores. A share of yes and no has the textbook's
standard error instead, of two more hits and two more misses (Agresti and Coull): 500 of 500 is no certainty,
although every draw gives 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainer.metrics import Rows, totals

NUM_DRAWS: Final = 1000
SEED: Final = 0

Value = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True)
class Score:
    """A value and its standard error, both in the unit of the metric."""

    value: float
    standard_error: float


def score(rows: Rows, value: Value, *, yes_or_no: bool = False) -> Score:
    """The score of all `rows`. `yes_or_no`: rows are (0 or 1, 1) and the value is in percent."""
    sums = totals(rows)
    if not yes_or_no:
        return Score(value(sums), _deviation([value(draw) for draw in _draws(rows)]))
    hits, count = sums[0] + 2.0, sums[1] + 4.0
    share = hits / count
    return Score(value(sums), 100.0 * math.sqrt(share * (1.0 - share) / count))


def difference(rows: Rows, others: Rows, value: Value) -> Score:
    """How much better `rows` scores than `others` on the same examples: both are drawn alike."""
    assert len(rows) == len(others), "a paired comparison"
    drawn = zip(_draws(rows), _draws(others), strict=True)
    between = [value(a) - value(b) for a, b in drawn]
    return Score(value(totals(rows)) - value(totals(others)), _deviation(between))


def _draws(rows: Rows) -> list[list[float]]:
    """Column totals of `NUM_DRAWS` draws; the same draws for any rows of the same length."""
    table = torch.tensor(rows, dtype=torch.float64)  # [n, k]
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for _ in range(NUM_DRAWS):
        drawn: Tensor = torch.randint(len(rows), (len(rows),), generator=generator)
        found.append(table[drawn].sum(0).tolist())
    return found


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation; NaN where a value is infinite, as a perplexity may be."""
    if not all(map(math.isfinite, values)):
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
