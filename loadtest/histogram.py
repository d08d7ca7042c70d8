"""Durations counted in buckets of equal ratio: as many as come, in memory that does not grow.

Used for the gaps between tokens, of which an hour of load has tens of millions. One thread.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

_SMALLEST: Final = 1e-6  # seconds; what is shorter counts as this
_LARGEST: Final = 1e4
_RATIO: Final = 1.005  # a percentile is off by half a per cent at most
_STEP: Final = math.log(_RATIO)
_NUM_BUCKETS: Final = math.ceil(math.log(_LARGEST / _SMALLEST) / _STEP) + 1


class LogHistogram:
    """Counts of durations in seconds; percentiles to within half a per cent."""

    def __init__(self) -> None:
        self._counts = [0] * _NUM_BUCKETS
        self.total = 0

    def add(self, seconds: float) -> None:
        """One more duration."""
        self.total += 1
        bucket = int(math.log(seconds / _SMALLEST) / _STEP) if seconds > _SMALLEST else 0
        self._counts[min(bucket, _NUM_BUCKETS - 1)] += 1

    def percentile(self, percent: float) -> float | None:
        """The duration that `percent` of all do not exceed; None without any."""
        if not self.total:
            return None
        wanted = max(math.ceil(self.total * percent / 100), 1)
        bucket = int(np.searchsorted(np.cumsum(self._counts), wanted))
        return _middle(bucket)

    def curve(self) -> tuple[list[float], list[float]]:
        """The distribution function: seconds, and the share of durations up to there."""
        filled = [(_middle(bucket), n) for bucket, n in enumerate(self._counts) if n]
        shares = np.cumsum([n for _, n in filled]) / max(self.total, 1)
        return [seconds for seconds, _ in filled], shares.tolist()


def _middle(bucket: int) -> float:
    return _SMALLEST * math.exp((bucket + 0.5) * _STEP)
