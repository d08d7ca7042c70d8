"""Where a run stands, from the records so far: what the live table and the plain lines show. Pure and frozen.

A display keeps one `RunState` and replaces it at each record, so the thread that draws sees a whole one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Final

from trainer.history import points
from trainer.records import NOT_METRICS, Record

_KEPT_LOSSES: Final = 2_000
_RATE_STEPS: Final = 50  # steps whose pace foretells the time left
_BARS: Final = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class RunState:
    """`num_steps`: of the whole run, 0 until it is known. `recent`: (step, seconds) of the last steps. `losses`: of the last steps, oldest first."""

    num_steps: int = 0
    step: int = 0
    sizes: str = ""
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    held_out_loss: float | None = None
    best: tuple[int, float] | None = None
    metrics: tuple[tuple[str, float], ...] = ()
    losses: tuple[float, ...] = ()
    recent: tuple[tuple[int, float], ...] = ()
    warnings: tuple[str, ...] = ()
    end_reason: str | None = None

    def after(self, record: Record) -> RunState:
        """The state once `record` is known."""
        match record["kind"]:
            case "begin":
                return self._after_begin(record)
            case "step":
                return self._after_step(record)
            case "held_out":
                return self._after_held_out(record)
            case "warning":
                return replace(self, warnings=(*self.warnings, str(record.get("message", ""))))
            case "end":
                return replace(self, end_reason=str(record["reason"]))
            case _:
                return self

    def _after_begin(self, record: Record) -> RunState:
        examples = (
            f"{record['num_training']:,} examples to train on, {record['num_held_out']:,} held out"
        )
        return replace(
            self,
            num_steps=int(record["num_steps"]),
            step=int(record["step"]),
            sizes=f"{examples}; {record['num_parameters']:,} parameters",
            recent=(),  # a resumed run's pace is its own
            end_reason=None,
        )

    def _after_step(self, record: Record) -> RunState:
        loss, seconds = _value(record, "loss"), _value(record, "seconds")
        step = int(record["step"])
        return replace(
            self,
            step=step,
            loss=loss,
            learning_rate=_value(record, "learning_rate"),
            grad_norm=_value(record, "grad_norm"),
            tokens_per_second=_value(record, "tokens_per_second"),
            seconds=seconds,
            losses=(*self.losses, loss)[-_KEPT_LOSSES:],
            recent=(*self.recent, (step, seconds))[-_RATE_STEPS:],
        )

    def _after_held_out(self, record: Record) -> RunState:
        step, loss = int(record["step"]), _value(record, "loss")
        better = math.isfinite(loss) and (self.best is None or loss < self.best[1])
        metrics = tuple(
            (name, float(value))
            for name, value in record.items()
            if name not in NOT_METRICS and isinstance(value, int | float)
        )
        return replace(
            self,
            held_out_loss=loss,
            best=(step, loss) if better else self.best,
            metrics=metrics or self.metrics,
        )

    @property
    def seconds_left(self) -> float | None:
        """By the pace of the last steps; None before there is one. Early stopping may end the run sooner."""
        if len(self.recent) < 2:
            return None
        (first, began), (last, now) = self.recent[0], self.recent[-1]
        pace = (now - began) / (last - first)
        return max(self.num_steps - self.step, 0) * pace


def sparkline(values: tuple[float, ...], width: int) -> str:
    """The values as up to `width` bars, the lowest of them lowest; a bar is the mean of its share. NaN is a gap."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    shares = [values[start:end] for start, end in itertools.pairwise(edges)]
    means = [_mean(share) for share in shares]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return " " * count
    low, span = min(finite), max(finite) - min(finite)
    return "".join(_bar(mean, low, span) for mean in means)


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:12:34`."""
    whole = max(round(seconds), 0)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _value(record: Record, field: str) -> float:
    """One number of a record; NaN where there is none."""
    [(_, value)] = points([{"step": 0, field: record.get(field)}], field) or [(0, math.nan)]
    return value


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _bar(value: float, low: float, span: float) -> str:
    if not math.isfinite(value):
        return " "
    share = (value - low) / span if span else 0.0
    return _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)]
