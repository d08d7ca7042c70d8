"""What happened to each request of a run, in arrays that are as long as the traffic and no longer.

Written by `generated_answer` and `open_loop` on the event loop, read by `progress` while the run goes on and by `summary`
after it. Times are seconds after the run's start. Latencies are counted from when a request was scheduled, not from when
it was sent: that a generator or a server is late must not make answers look quicker.
"""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from typing import Final

import numpy as np

from loadtest.histogram import LogHistogram
from loadtest.traffic import Traffic

MAX_REASONS: Final = 50
OTHER: Final = "other"


class Outcome(IntEnum):
    """How a request ended. UNFINISHED: it was under way when the run was ended; PENDING: never scheduled."""

    PENDING = 0
    UNFINISHED = 1
    DONE = 2
    REFUSED = 3
    FAILED = 4


TIERS: Final = ("unknown", "none", "device", "host", "disk")


class Recorder:
    """One run. All arrays are `[num_requests]`; NaN where a thing has not happened."""

    def __init__(self, traffic: Traffic, warmup_seconds: float, end_seconds: float) -> None:
        """`end_seconds`: when the last request has been sent; what comes later counts for no throughput."""
        count = len(traffic)
        self.traffic = traffic
        self.warmup_seconds = warmup_seconds
        self.lag = np.full(count, np.nan)
        self.first_token = np.full(count, np.nan)
        self.ended = np.full(count, np.nan)
        self.num_output = np.zeros(count, dtype=np.int32)
        self.outcome = np.zeros(count, dtype=np.int8)
        self.tier = np.zeros(count, dtype=np.int8)
        self.gaps = LogHistogram()
        self.reasons: Counter[str] = Counter()
        self.num_sent = self.num_done = self.num_failed = 0
        # Per second of the run; a little longer, for the last fraction of one.
        self.tokens_per_bin = np.zeros(int(end_seconds) + 2, dtype=np.int64)
        self.done_per_bin = np.zeros(int(end_seconds) + 2, dtype=np.int64)
        self.window_tokens = self.window_done = 0
        self._end_seconds = end_seconds

    @property
    def num_under_way(self) -> int:
        return self.num_sent - self.num_done - self.num_failed

    @property
    def window_seconds(self) -> float:
        """Length of the window that counts."""
        return self._end_seconds - self.warmup_seconds

    def sent(self, index: int, now: float) -> None:
        """A request leaves, later than scheduled by its lag."""
        self.num_sent += 1
        self.lag[index] = now - self.traffic.at[index]
        self.outcome[index] = Outcome.UNFINISHED

    def tokens(self, index: int, count: int, gap: float | None, now: float) -> None:
        """An event with tokens; `gap` since the one before it, None for the first."""
        if gap is None:
            self.first_token[index] = now
        elif self._counts(index):
            self.gaps.add(gap)
        self.num_output[index] += count
        if now < self._end_seconds:
            self.tokens_per_bin[int(now)] += count
            if now >= self.warmup_seconds:
                self.window_tokens += count

    def done(self, index: int, tier: str, now: float) -> None:
        """The whole answer has come."""
        self._end(index, Outcome.DONE, now)
        self.num_done += 1
        self.tier[index] = TIERS.index(tier) if tier in TIERS else 0
        if now < self._end_seconds:
            self.done_per_bin[int(now)] += 1
            self.window_done += now >= self.warmup_seconds

    def failed(self, index: int, outcome: Outcome, reason: str, now: float) -> None:
        """No whole answer comes any more. `reason` begins with the status, if there was one."""
        self._end(index, outcome, now)
        self.num_failed += 1
        if outcome is not Outcome.UNFINISHED and self._counts(index):
            known = reason in self.reasons or len(self.reasons) < MAX_REASONS
            self.reasons[reason if known else OTHER] += 1

    def _end(self, index: int, outcome: Outcome, now: float) -> None:
        assert np.isnan(self.ended[index]), "a request ends once"
        self.outcome[index] = outcome
        self.ended[index] = now

    def _counts(self, index: int) -> bool:
        return bool(self.traffic.at[index] >= self.warmup_seconds)
