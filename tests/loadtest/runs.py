"""Small traffic and filled recorders for the tests of the load generator."""

from __future__ import annotations

import numpy as np

from loadtest.recorder import Outcome, Recorder
from loadtest.traffic import Shape, Traffic


def shape(seconds: float = 1.0, warmup: float = 0.0) -> Shape:
    """Of the window; the rate is of no account where the traffic is given."""
    return Shape(10.0, 1.0, 1.0, (1, 4), (1, 4), warmup, seconds, 0)


def traffic_at(*times: float, output_len: int = 2, num_tasks: int = 1) -> Traffic:
    """Requests at these times, with prompts of three tokens."""
    count = len(times)
    return Traffic(
        at=np.array(times),
        task=np.arange(count) % num_tasks,
        input_len=np.full(count, 3),
        output_len=np.full(count, output_len),
        seed=0,
    )


def answered(record: Recorder, index: int, first: float, last: float, tier: str = "device") -> None:
    """A whole answer of two events with a token each, at these times after the start."""
    record.sent(index, float(record.traffic.at[index]))
    record.tokens(index, 1, None, first)
    record.tokens(index, 1, last - first, last)
    record.done(index, tier, last)


def unanswered(record: Recorder, index: int, outcome: Outcome, reason: str) -> None:
    """A request without an answer."""
    at = float(record.traffic.at[index])
    record.sent(index, at)
    record.failed(index, outcome, reason, at + 0.01)
