"""One run as the rules see it, and the judgements that several rules share. Frozen and pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trainer.doctor.signals import Signals
from trainer.doctor.summary import DataSummary, Settings
from trainer.history import History

SOLVED_LOSS: Final = 0.1
"""Nats a token. Below it greedy decoding of some ten tokens is nearly always right: nothing needs repair."""

SMALL_GAIN: Final = 0.05
"""Share of the first loss. Even a learning rate 100 times too low for a task takes less away in a whole run; every
sane run on the demo's tasks took more than 0.7."""

NO_GAP: Final = 0.02
"""Of the loss: by so much a completion must be more probable behind its own prompt before it depends on it. Shuffled
completions give -0.05 to 0.01 on 32 held-out examples, the demo's real tasks 0.1 to 40 once they are learned."""


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that is known of a run."""

    history: History
    signals: Signals
    settings: Settings
    data: DataSummary

    @property
    def is_solved(self) -> bool:
        best = self.signals.best
        return best is not None and best[1] <= SOLVED_LOSS

    @property
    def hardly_improved(self) -> bool:
        """The held-out loss is nearly where it began, and that was not good."""
        gain = self.signals.gain
        return gain is not None and gain < SMALL_GAIN and not self.is_solved

    @property
    def prompts_matter(self) -> bool | None:
        """Whether completions are more probable behind their own prompts at last; None if it was not measured."""
        gap, loss = self.signals.prompt_gap_last, self.signals.held_last
        return None if gap is None or loss is None else gap > NO_GAP * loss

    @property
    def prompts_never_mattered(self) -> bool:
        """At no evaluation, the one before the first step included."""
        most = self.signals.prompt_share_most
        return most is not None and most <= NO_GAP

    @property
    def growth(self) -> float | None:
        """How many times longer keys or values became, in the median layer, whichever grew more."""
        ratios = [r for r in (self.signals.key_ratio, self.signals.value_ratio) if r is not None]
        grown = [r.median_last / r.median_first for r in ratios if r.median_first > 0]
        return max(grown) if grown else None


def nats(value: float) -> str:
    return f"{value:.3g}"


def share(value: float) -> str:
    return f"{100 * value:.3g} %"
