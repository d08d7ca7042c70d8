"""A run's records, sorted by kind and freed of what a resumed run did twice. Pure; the plots, the report and the
doctor begin with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from trainer.records import LOSS_OTHER_PROMPT, LOSS_OTHER_PROMPT_ERROR, NOT_METRICS, Record

Points: TypeAlias = tuple[tuple[int, float], ...]
"""(step, value), by rising step. A value may be NaN or infinite."""


@dataclass(frozen=True, slots=True)
class History:
    """Each tuple by rising step, one record a step at most."""

    begin: Record | None
    steps: tuple[Record, ...]
    held_out: tuple[Record, ...]
    prefix: tuple[Record, ...]
    warnings: tuple[Record, ...]
    end: Record | None

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        """Where a step comes again, the run was resumed before it: what followed the first time is dropped."""
        kinds: dict[str, list[Record]] = {"step": [], "held_out": [], "prefix": []}
        warnings: list[Record] = []
        begin: Record | None = None
        end: Record | None = None
        for record in records:
            kind = record["kind"]
            if kind in kinds:
                _append(kinds[kind], record)
                end = None
            elif kind == "warning":
                warnings.append(record)
            elif kind == "begin":
                begin = begin or record
            elif kind == "end":
                end = record
        return cls(
            begin=begin,
            steps=tuple(kinds["step"]),
            held_out=tuple(kinds["held_out"]),
            prefix=tuple(kinds["prefix"]),
            warnings=tuple(warnings),
            end=end,
        )

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def train_loss(self) -> Points:
        return points(self.steps, "loss")

    def held_out_loss(self) -> Points:
        return points(self.held_out, "loss")

    def loss_other_prompt(self) -> Points:
        return points(self.held_out, LOSS_OTHER_PROMPT)

    def loss_other_prompt_error(self) -> Points:
        """Of logs that are older than the error none."""
        return points(self.held_out, LOSS_OTHER_PROMPT_ERROR)

    def metrics(self) -> dict[str, Points]:
        """The generated metrics, by name."""
        names = {name for record in self.held_out for name in record}
        found = {name: points(self.held_out, name) for name in sorted(names - NOT_METRICS)}
        return {name: values for name, values in found.items() if values}

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest held-out loss that is a number."""
        finite = [(loss, step) for step, loss in self.held_out_loss() if math.isfinite(loss)]
        if not finite:
            return None
        loss, step = min(finite)
        return step, loss


def points(records: Sequence[Record], field: str) -> Points:
    """A field over the steps. Where it is not a number it is left out; null, which JSON has for NaN, is NaN."""
    found = [(int(record["step"]), _number(record[field])) for record in records if field in record]
    return tuple((step, value) for step, value in found if value is not None)


def per_layer(record: Record, field: str) -> tuple[float, ...]:
    """A field with one number a layer; empty where the record has none."""
    return tuple(_number(value) or 0.0 for value in record.get(field) or ())


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and its up to `window - 1` forerunners."""
    means = []
    for index in range(len(values)):
        recent = values[max(index + 1 - window, 0) : index + 1]
        means.append(sum(recent) / len(recent))
    return means


def _append(known: list[Record], record: Record) -> None:
    while known and known[-1]["step"] >= record["step"]:
        known.pop()
    known.append(record)


def _number(value: Any) -> float | None:
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) else None
