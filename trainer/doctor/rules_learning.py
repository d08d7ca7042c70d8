"""Runs that did not learn because of their settings: learning rate and length. Pure."""

from __future__ import annotations

import math
from typing import Final

from trainer.doctor.case import NO_GAP, Case, nats, share
from trainer.doctor.finding import Failure, Finding, Severity
from trainer.doctor.rules_stability import EXPLODED, OWN_GROWTH
from trainer.doctor.signals import Window

HARDLY_MOVED: Final = 0.02
"""The prefix's way from its start over its own norm, in the median layer. Runs that learned anything moved by 0.1 to
0.8, one whose learning rate was a thousand times too low by 0.0002."""

STILL_STRAIGHT: Final = 0.8
"""Steepness of the held-out loss in the last third over the whole, per learning rate spent. A run that has only begun
falls along a straight line (1); those that settle are at 0 to 0.7."""

BARELY_UNDERWAY: Final = 0.1  # moved by less, a straight line means that it has only begun

RISES: Final = 1.05
"""Times the first training loss. And by three standard errors, so that noise of small batches is not taken for it."""

GAP_LOST: Final = 0.1  # of the dependence on the prompt that the base began with

UNDERFIT: Final = 0.8
"""Training loss over held-out loss. With more than this there is no overfitting that a longer prefix would worsen."""


def learning_rate_too_low(case: Case) -> Finding | None:
    """The prefix is nearly where it began, and so is the loss; or it has only begun to move."""
    signals = case.signals
    if not signals.is_long_enough or signals.moved is None or case.is_solved:
        return None
    stuck = case.hardly_improved and signals.moved < HARDLY_MOVED
    underway = (
        signals.bend is not None
        and signals.bend >= STILL_STRAIGHT
        and signals.moved < BARELY_UNDERWAY
        and (signals.gain or 0.0) > 0
    )
    if not (stuck or underway):
        return None
    bend = (
        ""
        if signals.bend is None
        else f"; in the last third it fell {signals.bend:.1f} times as steeply as overall"
    )
    return Finding(
        Failure.LEARNING_RATE_TOO_LOW,
        Severity.ERROR if stuck else Severity.WARNING,
        f"In {signals.num_steps} steps the prefix moved by {share(signals.moved)} of its own norm in the median layer, "
        f"and {_fall(case)}{bend}.",
        f"Raise the learning rate{_rate(case)} about {_factor(signals.moved)} times; more steps help too.",
    )


def learning_rate_too_high(case: Case) -> Finding | None:
    """The loss rose, or the prefix grew until the prompt no longer counted."""
    signals = case.signals
    grown = case.growth
    first, last = signals.train_first, signals.train_last
    reasons = []
    if signals.is_long_enough and first is not None and last is not None and _rose(first, last):
        reasons.append(
            f"the training loss rose from {nats(first.mean)} to {nats(last.mean)} nats a token"
        )
    if grown is not None and _drowned(case, grown):
        reasons.append(_drowning(case, grown))
    if not reasons:
        return None
    return Finding(
        Failure.LEARNING_RATE_TOO_HIGH,
        Severity.ERROR,
        f"{_capital(' and '.join(reasons))}.",
        f"Lower the learning rate{_rate(case)} to a tenth.",
    )


def prefix_too_short(case: Case) -> Finding | None:
    """Few tokens, that moved and fit training and held-out data equally badly. The last to be asked."""
    signals, length = case.signals, case.settings.num_virtual_tokens
    last, held = signals.train_last, signals.held_last
    if length is None or not case.is_short or last is None or held is None or case.is_solved:
        return None
    moved = signals.moved is None or signals.moved >= HARDLY_MOVED
    if not moved or last.mean < UNDERFIT * held or not signals.is_long_enough:
        return None
    return Finding(
        Failure.PREFIX_TOO_SHORT,
        Severity.ERROR if case.hardly_improved else Severity.WARNING,
        f"With {length} token{'s' * (length > 1)} the loss ends at {nats(held)} nats a token on held-out and "
        f"{nats(last.mean)} on training data: it fits neither, although the prefix moved"
        f"{'' if signals.moved is None else f' by {share(signals.moved)} of its norm'}.",
        f"Take a longer prefix: {max(4 * length, 10)} tokens.",
    )


def no_improvement(case: Case) -> Finding | None:
    """Nothing was gained, and no other rule knows why."""
    first, best = case.signals.held_first, case.signals.best
    if not case.hardly_improved or not case.signals.is_long_enough or first is None or best is None:
        return None
    return Finding(
        Failure.NO_IMPROVEMENT,
        Severity.ERROR,
        f"{_capital(_fall(case))}, and the records do not show why.",
        "See whether the base can do the task at all: a few examples in its prompt should help. If they do, try ten "
        "times the learning rate and four times the length; if not, take another base.",
    )


def _drowned(case: Case, grown: float) -> bool:
    """The prefix grew, and with it went what the base made of the prompt. Where the prompt counted little from the
    start, only norms that exploded are proof enough.
    """
    first, last = case.signals.prompt_gap_first, case.signals.prompt_gap_last
    loss = case.signals.held_first
    if first is None or last is None or loss is None or first <= NO_GAP * loss:
        return grown >= EXPLODED
    return grown >= OWN_GROWTH and case.is_loud and last < GAP_LOST * first


def _drowning(case: Case, grown: float) -> str:
    first, last = case.signals.prompt_gap_first, case.signals.prompt_gap_last
    growth = f"training made the prefix {grown:.1f} times as long in the median layer"
    if first is None or last is None:
        return growth
    return (
        f"{growth}, and completions, at first {nats(first)} nats a token more probable behind their own prompts than "
        f"behind others, are so by {nats(last)} at last"
    )


def _rose(first: Window, last: Window) -> bool:
    noise = 3 * math.hypot(first.error, last.error)
    return last.mean > max(RISES * first.mean, first.mean + noise)


def _fall(case: Case) -> str:
    first, best = case.signals.held_first, case.signals.best
    if first is None or best is None:
        return "the held-out loss is not known"
    return f"the held-out loss went from {nats(first)} to {nats(best[1])} nats a token at best"


def _rate(case: Case) -> str:
    rates = [float(record["learning_rate"]) for record in case.history.steps]
    return f" ({max(rates):.3g})" if rates else ""


def _factor(moved: float) -> int:
    """What would take the prefix about a quarter of its norm away, in round numbers."""
    wanted = 0.25 / max(moved, 1e-6)
    return next((factor for factor in (3, 10, 30, 100) if wanted < 2 * factor), 100)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
