"""What the doctor measures in the records, once, before any rule judges. Pure; called by `diagnose`.

Losses are nats a completion token. A loss that is not a number counts as none here: `rules_stability` sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, pstdev
from typing import Final, NamedTuple

from trainer.history import History, Points, per_layer, points
from trainer.records import Record

MIN_STEPS: Final = 20  # fewer steps have no trend that could be told from noise
_ERRORS: Final = 2  # standard errors that chance explains
_WINDOW: Final = 0.2  # of the steps: what "at first" and "at last" mean for the training loss


@dataclass(frozen=True, slots=True)
class Window:
    """Training loss over some neighbouring steps. `error`: standard error of the mean."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class LayerSignal:
    """One number a layer, at the first and at the last prefix record."""

    first: tuple[float, ...]
    last: tuple[float, ...]

    @property
    def median_first(self) -> float:
        return median(self.first)

    @property
    def median_last(self) -> float:
        return median(self.last)


@dataclass(frozen=True, slots=True)
class Signals:
    """None where the records do not say.

    `held_first` .. `held_last`: held-out loss; `best`: (step, loss). `train_first`, `train_last`: the first and last
    fifth of the steps; `train_at_best`: the fifth that ends where the held-out loss was best. `bend`: how steeply the
    held-out loss fell per unit of learning rate spent, in the last third over the whole; 1 is a straight line, near
    0 has settled. `prompt_gap_first`, `_last`: by how much a completion is more probable behind its own prompt than
    behind another's; `prompt_share_most`: the most that this was of the loss at the same step, less what chance explains. `moved`: median over the layers of the prefix's relative way from its start.
    """

    num_steps: int
    held_first: float | None
    held_last: float | None
    best: tuple[int, float] | None
    train_first: Window | None
    train_last: Window | None
    train_at_best: Window | None
    bend: float | None
    prompt_gap_first: float | None
    prompt_gap_last: float | None
    prompt_share_most: float | None
    moved: float | None
    key_ratio: LayerSignal | None
    value_ratio: LayerSignal | None
    attention: LayerSignal | None
    sink: LayerSignal | None

    @property
    def gain(self) -> float | None:
        """Share of the held-out loss at first that training took away; negative if it only rose."""
        if self.held_first is None or self.best is None or self.held_first <= 0:
            return None
        return 1.0 - self.best[1] / self.held_first

    @property
    def is_long_enough(self) -> bool:
        return self.num_steps >= MIN_STEPS


def measure(history: History) -> Signals:
    """Everything the rules look at."""
    held, train = _finite(history.held_out_loss()), _finite(history.train_loss())
    best = history.best()
    gaps = _prompt_gaps(history)
    return Signals(
        num_steps=history.num_steps,
        held_first=held[0][1] if held else None,
        held_last=held[-1][1] if held else None,
        best=best,
        train_first=_window(train, 0.0, _WINDOW),
        train_last=_window(train, 1.0 - _WINDOW, 1.0),
        train_at_best=None if best is None else _window_before(train, best[0]),
        bend=_bend(held, points(history.steps, "learning_rate")),
        prompt_gap_first=gaps[0].mean if gaps else None,
        prompt_gap_last=gaps[-1].mean if gaps else None,
        prompt_share_most=max((g.certain / g.loss for g in gaps if g.loss > 0), default=None),
        moved=_moved(history),
        key_ratio=_ratios(history, "key_norms"),
        value_ratio=_ratios(history, "value_norms"),
        attention=_layers(history, "attention_mass"),
        sink=_layers(history, "sink_mass"),
    )


# ---- losses ----------------------------------------------------------------------------------------


def _finite(values: Points) -> Points:
    return tuple((step, value) for step, value in values if math.isfinite(value))


def _window(train: Points, start: float, end: float) -> Window | None:
    part = [value for _, value in train[int(start * len(train)) : math.ceil(end * len(train))]]
    return _mean(part)


def _window_before(train: Points, step: int) -> Window | None:
    """The steps up to `step`, as many as a window has; the first ones for step 0."""
    width = max(math.ceil(_WINDOW * len(train)), 1)
    before = [value for at, value in train if at <= step]
    return _mean(before[-width:] or [value for _, value in train[:width]])


def _mean(values: Sequence[float]) -> Window | None:
    if not values:
        return None
    return Window(sum(values) / len(values), pstdev(values) / math.sqrt(len(values)))


def _bend(held: Points, rates: Points) -> float | None:
    """Learning rate spent is the measure of the way: a schedule that decays slows every run at its end."""
    spent, total = {0: 0.0}, 0.0
    for step, rate in rates:
        total += rate
        spent[step] = total
    way = [(spent[step] / total, loss) for step, loss in held if step in spent] if total > 0 else []
    late = [(at, loss) for at, loss in way if at >= 2 / 3]
    if len(way) < 5 or len(late) < 2 or late[-1][0] <= late[0][0]:
        return None
    whole = (way[0][1] - way[-1][1]) / (way[-1][0] - way[0][0])
    if whole <= 0:
        return None
    return (late[0][1] - late[-1][1]) / (late[-1][0] - late[0][0]) / whole


class _PromptGap(NamedTuple):
    """By how much the loss is higher behind another prompt, the standard error of that, and the loss."""

    mean: float
    error: float
    loss: float

    @property
    def certain(self) -> float:
        """What is left when chance had its part."""
        return self.mean - _ERRORS * self.error


def _prompt_gaps(history: History) -> list[_PromptGap]:
    """Where both were measured."""
    other = dict(_finite(history.loss_other_prompt()))
    errors = dict(_finite(history.loss_other_prompt_error()))
    held = _finite(history.held_out_loss())
    return [
        _PromptGap(other[step] - loss, errors.get(step, 0.0), loss)
        for step, loss in held
        if step in other
    ]


# ---- layers ----------------------------------------------------------------------------------------


def _moved(history: History) -> float | None:
    """The larger of keys and values in each layer, then the median layer: one layer alone may carry a task."""
    if not history.prefix:
        return None
    last = history.prefix[-1]
    ways = list(zip(per_layer(last, "moved_keys"), per_layer(last, "moved_values"), strict=False))
    return median(max(way) for way in ways) if ways else None


def _ratios(history: History, field: str) -> LayerSignal | None:
    """Norm of the prefix over that of ordinary tokens."""

    def of(record: Record) -> tuple[float, ...]:
        pairs = zip(per_layer(record, field), per_layer(record, f"natural_{field}"), strict=False)
        return tuple(own / natural for own, natural in pairs if natural > 0)

    return _first_and_last([of(record) for record in history.prefix])


def _layers(history: History, field: str) -> LayerSignal | None:
    return _first_and_last([per_layer(record, field) for record in history.prefix])


def _first_and_last(rows: Sequence[tuple[float, ...]]) -> LayerSignal | None:
    known = [row for row in rows if row and all(map(math.isfinite, row))]
    return LayerSignal(known[0], known[-1]) if known else None
